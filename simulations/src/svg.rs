//! Just enough SVG: panels with axes, lines, bands, bars and legends.

use std::fmt::Write;

pub(crate) const WIDTH: f64 = 860.0;
pub(crate) const PANEL_HEIGHT: f64 = 320.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 210.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
/// Wong, "Points of view: Color blindness", Nature Methods 8 (2011): told apart by everyone.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666"];

pub(crate) fn colour(i: usize) -> &'static str {
    COLOURS[i % COLOURS.len()]
}

/// One diagram of a picture; `y0` is its upper edge.
#[derive(Debug)]
pub(crate) struct Panel {
    body: String,
    y0: f64,
    x_max: f64,
    y_max: f64,
    legends: u32,
}

impl Panel {
    pub(crate) fn new(row: u32, title: &str, x_label: &str, y_label: &str, x_max: f64, y_max: f64) -> Self {
        let y0 = f64::from(row) * PANEL_HEIGHT;
        let mut panel = Panel { body: String::new(), y0, x_max, y_max, legends: 0 };
        panel.text(LEFT, y0 + 24.0, "start", "title", title);
        let (middle, base) = ((LEFT + WIDTH - RIGHT) / 2.0, y0 + PANEL_HEIGHT);
        panel.text(middle, base - 10.0, "middle", "label", x_label);
        let y = y0 + (TOP + PANEL_HEIGHT - BOTTOM) / 2.0;
        let label = escape(y_label);
        panel.push(&format!(
            r#"<text class="label" text-anchor="middle" transform="translate(18 {y:.1}) rotate(-90)">{label}</text>"#
        ));
        panel.y_ticks();
        panel
    }

    /// Ticks along x; a panel of bars has none.
    pub(crate) fn x_ticks(&mut self) {
        for (value, label) in ticks(self.x_max) {
            let (x, y) = (self.x(value), self.y(0.0));
            self.push(&format!(r#"<path class="axis" d="M{x:.1} {y:.1}v5"/>"#));
            self.text(x, y + 18.0, "middle", "tick", &label);
        }
    }

    pub(crate) fn line(&mut self, points: &[(f64, f64)], colour: &str) {
        let inside: Vec<_> = points.iter().copied().filter(|p| p.0 <= self.x_max).collect();
        if inside.is_empty() {
            return;
        }
        let path = self.path(inside.into_iter());
        self.push(&format!(r#"<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>"#));
    }

    /// Between two lines over the same x: (x, low, high).
    pub(crate) fn band(&mut self, points: &[(f64, f64, f64)], colour: &str) {
        let low = points.iter().map(|p| (p.0, p.1));
        let path = self.path(low.chain(points.iter().rev().map(|p| (p.0, p.2))));
        self.push(&format!(r#"<path d="M{path}Z" fill="{colour}" fill-opacity="0.2"/>"#));
    }

    pub(crate) fn vertical(&mut self, x: f64, label: &str) {
        let (x, top, bottom) = (self.x(x), self.y(self.y_max), self.y(0.0));
        self.push(&format!(
            r##"<path d="M{x:.1} {top:.1}V{bottom:.1}" stroke="#222" stroke-width="1.5" stroke-dasharray="6 4"/>"##
        ));
        self.legend_with(label, r##"stroke="#222" stroke-width="1.5" stroke-dasharray="6 4""##);
    }

    /// Bar `i` of `of`, stacked from `from` to `until`.
    pub(crate) fn bar(&mut self, i: usize, of: usize, from: f64, until: f64, colour: &str) {
        let slot = (WIDTH - LEFT - RIGHT) / of as f64;
        let (x, width) = (LEFT + slot * (i as f64 + 0.2), slot * 0.6);
        let (y, height) = (self.y(until), self.y(from) - self.y(until));
        self.push(&format!(r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#));
    }

    pub(crate) fn bar_label(&mut self, i: usize, of: usize, label: &str) {
        let slot = (WIDTH - LEFT - RIGHT) / of as f64;
        self.text(LEFT + slot * (i as f64 + 0.5), self.y(0.0) + 18.0, "middle", "tick", label);
    }

    pub(crate) fn legend(&mut self, label: &str, colour: &str) {
        self.legend_with(label, &format!(r#"stroke="{colour}" stroke-width="4""#));
    }

    fn legend_with(&mut self, label: &str, stroke: &str) {
        let (x, y) = (WIDTH - RIGHT + 16.0, self.y0 + TOP + 10.0 + 20.0 * f64::from(self.legends));
        self.push(&format!(r#"<path d="M{x:.1} {y:.1}h22" {stroke}/>"#));
        self.text(x + 30.0, y + 4.0, "start", "tick", label);
        self.legends += 1;
    }

    fn y_ticks(&mut self) {
        let (x0, x1) = (LEFT, WIDTH - RIGHT);
        for (value, label) in ticks(self.y_max) {
            let y = self.y(value);
            self.push(&format!(r#"<path class="grid" d="M{x0:.1} {y:.1}H{x1:.1}"/>"#));
            self.text(x0 - 8.0, y + 4.0, "end", "tick", &label);
        }
        let (top, bottom) = (self.y(self.y_max), self.y(0.0));
        self.push(&format!(r#"<path class="axis" d="M{x0:.1} {top:.1}V{bottom:.1}H{x1:.1}"/>"#));
    }

    fn path(&self, points: impl Iterator<Item = (f64, f64)>) -> String {
        let points: Vec<String> = points.map(|(x, y)| format!("{:.1} {:.1}", self.x(x), self.y(y))).collect();
        points.join("L")
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * value / self.x_max
    }

    fn y(&self, value: f64) -> f64 {
        self.y0 + PANEL_HEIGHT - BOTTOM - (PANEL_HEIGHT - TOP - BOTTOM) * value / self.y_max
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let text = escape(text);
        self.push(&format!(r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" class="{class}">{text}</text>"#));
    }

    fn push(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }
}

pub(crate) fn picture(panels: &[Panel]) -> String {
    let height = PANEL_HEIGHT * panels.len() as f64;
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">
<style>text{{font-family:system-ui,sans-serif;fill:#222}}.title{{font-size:15px;font-weight:600}}.label{{font-size:12px}}.tick{{font-size:11px}}.axis{{stroke:#222;fill:none}}.grid{{stroke:#e3e3e3}}</style>
<rect width="100%" height="100%" fill="#fff"/>
"##
    );
    panels.iter().for_each(|p| svg.push_str(&p.body));
    let _ = writeln!(svg, "</svg>");
    svg
}

/// About five round steps from zero to `max`.
fn ticks(max: f64) -> Vec<(f64, String)> {
    let raw = max / 5.0;
    if !(raw.is_finite() && raw > 0.0) {
        return Vec::new();
    }
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw * 0.999).unwrap_or(raw);
    let digits = (0..6).find(|d| step * 10f64.powi(*d) >= 0.999).unwrap_or(6).unsigned_abs() as usize;
    let at = |i: u32| f64::from(i) * step;
    (0..12).map(at).take_while(|v| *v <= max * 1.0001).map(|v| (v, format!("{v:.digits$}"))).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
