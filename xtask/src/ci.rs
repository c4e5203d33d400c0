//! Everything CI runs, in the order in which failing is cheapest.

use crate::fixtures::{self, Fixtures};
use crate::run::{Totals, cargo, count_cargo, count_unittest, program, root, show};
use crate::{crates, deploy, netns, ptx, rdma_vm};
use anyhow::Result;
use std::process::Command;

/// Runs all steps, prints the totals, and returns whether everything passed.
pub(crate) fn run() -> Result<bool> {
    let mut ci = Ci { totals: Totals::default() };
    ci.step("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    ci.check("crate edges", crates::check);
    ci.check("PTX", ptx::check);
    let deny_warnings = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    ci.step("clippy", &mut cargo(&deny_warnings))?;
    let mut docs = cargo(&["doc", "--workspace", "--no-deps", "--locked"]);
    ci.step("docs", docs.env("RUSTDOCFLAGS", "-D warnings"))?;
    ci.tests(&["test", "--workspace", "--locked", "--no-fail-fast"])?;
    ci.step("release build", &mut cargo(&["build", "--release", "--locked"]))?;
    ci.totals.add(deploy::run()?);
    ci.simulations()?;
    ci.netns()?;
    ci.rdma()?;
    ci.gpu()?;
    let fixtures = fixtures::prepare()?;
    ci.python(&fixtures)?;
    ci.demos(&fixtures)?;
    let Totals { passed, failed, skipped } = ci.totals;
    println!(
        "\n{passed} passed, {failed} failed{}",
        if skipped > 0 { format!(", {skipped} skipped") } else { String::new() }
    );
    Ok(failed == 0)
}

struct Ci {
    totals: Totals,
}

impl Ci {
    /// A check that counts as one test.
    fn step(&mut self, what: &str, command: &mut Command) -> Result<bool> {
        let (ok, _) = show(what, command)?;
        self.count(ok);
        Ok(ok)
    }

    /// A check made in this process.
    fn check(&mut self, what: &str, check: fn() -> Result<()>) {
        println!("\n== {what}");
        let result = check();
        if let Err(error) = &result {
            println!("{error:#}");
        }
        self.count(result.is_ok());
    }

    fn tests(&mut self, args: &[&str]) -> Result<()> {
        let (ok, output) = show("tests", &mut cargo(args))?;
        let counted = count_cargo(&output);
        // A test binary that did not build or crashed fails without a line of its own.
        let unsaid = u64::from(!ok && counted.failed == 0);
        self.totals.add(Totals { failed: counted.failed + unsaid, ..counted });
        Ok(())
    }

    /// Every committed scenario at its smaller sizes, and random ones; a bug planted in the
    /// scheduler must not go unseen.
    fn simulations(&mut self) -> Result<()> {
        let simulations = |features: &[&str], args: &[&str]| {
            let run = ["run", "--release", "--locked", "--package", "simulations"];
            cargo(&[&run[..], features, &["--"], args].concat())
        };
        self.step("simulations", &mut simulations(&[], &["all", "--quick"]))?;
        self.step("random faults", &mut simulations(&[], &["chaos", "--seeds", "100"]))?;
        let planted = ["--features", "planted-bug"];
        let (unseen, _) =
            show("random faults find a planted bug", &mut simulations(&planted, &["chaos", "--seeds", "100"]))?;
        println!("{}", if unseen { "the planted bug was NOT found" } else { "found, as it must be" });
        self.count(!unseen);
        Ok(())
    }

    /// Real agents over shaped links. How fast they are is for a quiet machine to say; here they
    /// must all end with the release, a killed one aside.
    fn netns(&mut self) -> Result<()> {
        if !netns::is_root() {
            println!("not root: the swarm over shaped links is skipped, it makes network namespaces");
            self.totals.skipped += 1;
            return Ok(());
        }
        let args = ["--nodes", "5", "--mbit", "50", "--mib", "16", "--runs", "1", "--kill", "1"];
        self.step("a swarm over shaped links", &mut netns::command(args.map(str::to_string)))?;
        let args = ["--ready", "2", "--storm", "4", "--mbit", "50", "--mib", "8", "--runs", "1"];
        self.step("new nodes that know a DNS name", &mut netns::storm(args.map(str::to_string)))?;
        Ok(())
    }

    /// On a real kernel's RDMA stack, in a guest, where this machine can have one.
    fn rdma(&mut self) -> Result<()> {
        match rdma_vm::tests()? {
            Some(totals) => self.totals.add(totals),
            None => self.totals.skipped += 1,
        }
        Ok(())
    }

    /// What the twin in host memory cannot show.
    fn gpu(&mut self) -> Result<()> {
        if std::path::Path::new("/dev/nvidiactl").exists() {
            return self.tests(&[
                "test",
                "--locked",
                "--package",
                "aquifer-cuda",
                "--features",
                "gpu-tests",
                "--test",
                "gpu",
            ]);
        }
        println!(
            "\n== GPU: skipped, no NVIDIA driver is here; `cargo test -p aquifer-cuda --features gpu-tests` runs it"
        );
        self.totals.skipped += 1;
        Ok(())
    }

    fn python(&mut self, fixtures: &Fixtures) -> Result<()> {
        if !fixtures.has_torch {
            println!("PyTorch is not here: the tests that need it are skipped");
        }
        for dir in ["python/tests", "tests/python", "tests/page"] {
            if !root().join(dir).is_dir() {
                continue;
            }
            let mut command = Command::new(&fixtures.python);
            command.args(["-m", "unittest", "discover", "-v", "-s", dir, "-t", dir]).current_dir(root());
            command.env("PYTHONPATH", root().join("python")).env("AQUIFER_BIN", program());
            command.env("PYTHONDONTWRITEBYTECODE", "1");
            if let Some(model) = &fixtures.model {
                command.env("AQUIFER_MINILM", model);
            }
            let (ok, output) = show(dir, &mut command)?;
            let counted = count_unittest(&output);
            let unsaid = u64::from(!ok && counted.failed == 0);
            self.totals.add(Totals { failed: counted.failed + unsaid, ..counted });
        }
        Ok(())
    }

    fn demos(&mut self, fixtures: &Fixtures) -> Result<()> {
        self.step("demo", Command::new(program()).arg("demo"))?;
        match &fixtures.model {
            Some(model) => {
                let checkpoint = model.join("model.safetensors");
                self.step(
                    "demo on a real model",
                    Command::new(program()).arg("demo").arg("--checkpoint").arg(checkpoint),
                )?;
            }
            None => {
                println!("the real model could not be fetched: the demo on it is skipped");
                self.totals.skipped += 1;
            }
        }
        Ok(())
    }

    fn count(&mut self, ok: bool) {
        if ok { self.totals.passed += 1 } else { self.totals.failed += 1 }
    }
}
