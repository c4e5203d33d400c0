//! The options that say how a release is rolled out.

use anyhow::{Context, Result, bail};
use aquifer_core::policy::{OnFailure, Required, Unavailable};
use aquifer_core::{How, Policy};
use clap::{Args, ValueEnum};

/// How a release is rolled out: which nodes take it, and when each switches.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PolicyOptions {
    /// When nodes switch [default: at-once]
    #[arg(long, value_enum, help_heading = "Rollout")]
    pub(crate) policy: Option<PolicyName>,
    /// Only nodes with all of these labels take it, such as ab=x; the others stay with what they have
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = "Rollout")]
    pub(crate) subset: Option<String>,
    /// The nodes that take it stay with it until one comes for exactly the same --subset
    #[arg(long, help_heading = "Rollout")]
    pub(crate) pin: bool,
    /// synchronous: how many nodes have to be prepared: all, a number, or a percentage; never less than a
    /// majority [default: all]
    #[arg(long, value_name = "NODES", help_heading = "Rollout")]
    pub(crate) required: Option<String>,
    /// synchronous: give up if too few are prepared after this many seconds [default: 3600]
    #[arg(long, value_name = "SECONDS", help_heading = "Rollout")]
    pub(crate) deadline: Option<u64>,
    /// synchronous: what this publisher does when a node fails after the commit: release what was before, or
    /// leave that node out [default: rollback]
    #[arg(long, value_enum, value_name = "WHAT", help_heading = "Rollout")]
    pub(crate) on_failure: Option<OnFailureName>,
    /// rolling: nodes with all of these labels go first, and the rest once all of them are checked
    #[arg(long, value_name = "KEY=VALUE,...", help_heading = "Rollout")]
    pub(crate) canary: Option<String>,
    /// rolling: how many nodes may be out at a time, a number or a percentage [default: 1]
    #[arg(long, value_name = "NODES", help_heading = "Rollout")]
    pub(crate) max_unavailable: Option<String>,
    /// rolling: --max-unavailable is of the nodes with the same value of this label, such as rack
    #[arg(long, value_name = "KEY", help_heading = "Rollout")]
    pub(crate) by: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyName {
    /// Each node as soon as it can
    AtOnce,
    /// All at one time, once all are prepared
    Synchronous,
    /// Canaries first, then a few at a time; back again if one fails
    Rolling,
    /// All, once `aquifer release commit` says so
    Manual,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnFailureName {
    Rollback,
    Stay,
}

impl PolicyOptions {
    /// Whether anything was said.
    pub(crate) fn is_given(&self) -> bool {
        self.policy.is_some() || self.subset.is_some() || self.pin
    }

    /// Without the nodes that it names, which the agent knows.
    pub(crate) fn policy(&self) -> Result<Policy> {
        let name = self.policy.unwrap_or(PolicyName::AtOnce);
        self.refuse_foreign(name)?;
        let selector =
            |text: &Option<String>, flag: &'static str| text.as_deref().map(str::parse).transpose().context(flag);
        let how = match name {
            PolicyName::AtOnce => How::AtOnce,
            PolicyName::Manual => How::Manual,
            PolicyName::Synchronous => How::Synchronous {
                required: self.required.as_deref().map_or(Ok(Required::All), required)?,
                deadline_ms: self.deadline.unwrap_or(3600).saturating_mul(1000),
                on_failure: match self.on_failure {
                    None | Some(OnFailureName::Rollback) => OnFailure::RollBack,
                    Some(OnFailureName::Stay) => OnFailure::Stay,
                },
            },
            PolicyName::Rolling => How::Rolling {
                canary: selector(&self.canary, "--canary")?,
                max_unavailable: self.max_unavailable.as_deref().map_or(Ok(Unavailable::Count(1)), unavailable)?,
                by: self.by.clone(),
            },
        };
        let subset = selector(&self.subset, "--subset")?.unwrap_or_default();
        let policy = Policy { subset, pinned: self.pin, how, roster: Vec::new() };
        policy.check()?;
        Ok(policy)
    }

    /// An option of another policy would be ignored, and somebody believe in it.
    fn refuse_foreign(&self, name: PolicyName) -> Result<()> {
        let synchronous = [("--required", self.required.is_some()), ("--deadline", self.deadline.is_some())];
        let synchronous = synchronous.into_iter().chain([("--on-failure", self.on_failure.is_some())]);
        let rolling = [("--canary", self.canary.is_some()), ("--max-unavailable", self.max_unavailable.is_some())];
        let rolling = rolling.into_iter().chain([("--by", self.by.is_some())]);
        let foreign = synchronous.map(|option| (PolicyName::Synchronous, option));
        let mut foreign = foreign.chain(rolling.map(|option| (PolicyName::Rolling, option)));
        match foreign.find(|(of, (_, given))| *given && *of != name) {
            Some((PolicyName::Synchronous, (flag, _))) => bail!("{flag} is for --policy synchronous"),
            Some((_, (flag, _))) => bail!("{flag} is for --policy rolling"),
            None => Ok(()),
        }
    }
}

fn required(text: &str) -> Result<Required> {
    let wrong = || format!("--required '{text}': it is 'all', a number of nodes, or a percentage such as 90%");
    if text == "all" {
        return Ok(Required::All);
    }
    match text.strip_suffix('%') {
        Some(percent) => {
            let percent: u16 = percent.parse().with_context(wrong)?;
            Ok(Required::PerMille(percent.saturating_mul(10)))
        }
        None => Ok(Required::Count(text.parse().with_context(wrong)?)),
    }
}

fn unavailable(text: &str) -> Result<Unavailable> {
    let wrong = || format!("--max-unavailable '{text}': it is a number of nodes, or a percentage such as 25%");
    match text.strip_suffix('%') {
        Some(percent) => Ok(Unavailable::Percent(percent.parse().with_context(wrong)?)),
        None => Ok(Unavailable::Count(text.parse().with_context(wrong)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::reasons;

    fn given(policy: PolicyName) -> PolicyOptions {
        PolicyOptions { policy: Some(policy), ..PolicyOptions::default() }
    }

    #[test]
    fn what_is_said_is_what_is_signed() {
        let options = PolicyOptions {
            required: Some("90%".into()),
            deadline: Some(60),
            subset: Some("b=2, a=1".into()),
            pin: true,
            ..given(PolicyName::Synchronous)
        };
        let policy = options.policy().unwrap();
        let required = Required::PerMille(900);
        assert_eq!(policy.how, How::Synchronous { required, deadline_ms: 60_000, on_failure: OnFailure::RollBack });
        assert_eq!((policy.subset.to_string().as_str(), policy.pinned), ("a=1,b=2", true));
        let options = PolicyOptions {
            max_unavailable: Some("25%".into()),
            canary: Some("role=canary".into()),
            by: Some("rack".into()),
            ..given(PolicyName::Rolling)
        };
        let How::Rolling { max_unavailable, by, .. } = options.policy().unwrap().how else { panic!("rolling") };
        assert_eq!((max_unavailable, by.as_deref()), (Unavailable::Percent(25), Some("rack")));
        assert_eq!(PolicyOptions::default().policy().unwrap(), Policy::default());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        let wrong = |options: PolicyOptions| reasons(&options.policy().expect_err("it is wrong"));
        let text = |text: &str| Some(text.to_string());
        for (options, said) in [
            (
                PolicyOptions { canary: text("a=b"), ..given(PolicyName::Synchronous) },
                "--canary is for --policy rolling",
            ),
            (PolicyOptions { deadline: Some(1), ..given(PolicyName::Rolling) }, "--deadline is for"),
            (PolicyOptions { required: text("most"), ..given(PolicyName::Synchronous) }, "--required 'most'"),
            (PolicyOptions { required: text("0"), ..given(PolicyName::Synchronous) }, "required"),
            (PolicyOptions { max_unavailable: text("0"), ..given(PolicyName::Rolling) }, "max_unavailable"),
            (PolicyOptions { subset: text("ab"), ..PolicyOptions::default() }, "--subset"),
        ] {
            let refusal = wrong(options);
            assert!(refusal.contains(said), "{refusal}");
        }
    }
}
