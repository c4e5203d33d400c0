//! The configuration file: TOML, by the names of the flags.

use super::defaults::directory;
use super::{AgentOptions, NodeOptions, OperationOptions};
use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a configuration file may hold.
#[derive(Debug, Default, Deserialize)]
struct FileOptions {
    #[serde(flatten)]
    node: NodeOptions,
    #[serde(flatten)]
    agent: AgentOptions,
    #[serde(flatten)]
    operation: OperationOptions,
    #[serde(flatten)]
    unknown: BTreeMap<String, toml::Value>,
}

/// An agent's options as flags and environment give them, completed from the configuration file.
pub(crate) fn of_agent(
    config: Option<&Path>,
    node: NodeOptions,
    agent: AgentOptions,
    operation: OperationOptions,
) -> Result<(NodeOptions, AgentOptions, OperationOptions)> {
    let file = read_config(config)?;
    Ok((node.or(file.node), agent.or(file.agent), operation.or(file.operation)))
}

/// The same for a node that comes and goes. The file is the agent's, which may run beside it: what
/// only one process can have, its ports, addresses and state, is not taken from there.
pub(crate) fn of_passing(config: Option<&Path>, node: NodeOptions) -> Result<NodeOptions> {
    Ok(node.or(read_config(config)?.node.shared()))
}

fn read_config(config: Option<&Path>) -> Result<FileOptions> {
    let Some(path) = config.map(Path::to_path_buf).or_else(default_config) else {
        return Ok(FileOptions::default());
    };
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_config(&text).with_context(|| path.display().to_string())
}

fn default_config() -> Option<PathBuf> {
    let home = directory("XDG_CONFIG_HOME").or_else(|| Some(directory("HOME")?.join(".config")));
    let own = home.map(|h| h.join("aquifer/aquifer.toml"));
    own.into_iter().chain([PathBuf::from("/etc/aquifer/aquifer.toml")]).find(|p| p.exists())
}

/// The options in `text`. They are read one by one, so that what is wrong with one can name it.
fn parse_config(text: &str) -> Result<FileOptions> {
    let table: toml::Table = text.parse().map_err(|error| not_toml(text, &error))?;
    let mut checked = toml::Table::new();
    for (key, value) in table {
        let one = toml::Table::from_iter([(key.clone(), as_meant(&key, value))]);
        let options: FileOptions =
            one.clone().try_into().map_err(|e: toml::de::Error| anyhow!("'{key}': {}", e.message()))?;
        if !options.unknown.is_empty() {
            bail!("there is no option '{key}'; the names are those of the flags of `aquifer agent --help`");
        }
        if one.values().all(|value| value.as_str() != Some("")) {
            checked.extend(one);
        }
    }
    Ok(checked.try_into()?)
}

fn not_toml(text: &str, error: &toml::de::Error) -> anyhow::Error {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    anyhow!("it is not TOML: line {}: {}", before.matches('\n').count() + 1, error.message())
}

/// As on the command line, a single value may stand where a list is meant; a size may be a number of bytes, and a
/// duration one of seconds.
fn as_meant(key: &str, value: toml::Value) -> toml::Value {
    const LISTS: [&str; 10] =
        ["peer", "listen", "external", "label", "trust", "channel", "pin", "hook", "webhook", "hook-event"];
    const NUMBERS: [&str; 5] = ["upload-window", "upload-limit", "store-limit", "memory-limit", "drain-grace"];
    match value.as_integer() {
        Some(number) if NUMBERS.contains(&key) => toml::Value::String(number.to_string()),
        None if value.is_str() && LISTS.contains(&key) => toml::Value::Array(vec![value]),
        _ => value,
    }
}

/// The first list, or the second if the first is empty. Empty words in a list, as after a last
/// comma, say nothing.
pub(super) fn list(first: Vec<String>, second: Vec<String>) -> Vec<String> {
    let said = |list: Vec<String>| {
        let words = list.iter().map(|word| word.trim()).filter(|word| !word.is_empty());
        words.map(str::to_string).collect::<Vec<_>>()
    };
    let first = said(first);
    if first.is_empty() { said(second) } else { first }
}

/// The same of what may have commas and spaces in it.
pub(super) fn lines(first: Vec<String>, second: Vec<String>) -> Vec<String> {
    let said = |list: Vec<String>| list.into_iter().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>();
    let first = said(first);
    if first.is_empty() { said(second) } else { first }
}

#[cfg(test)]
mod tests {
    use super::super::size;
    use super::*;
    use crate::errors::reasons;

    fn refusal(text: &str) -> String {
        reasons(&parse_config(text).expect_err(text))
    }

    #[test]
    fn a_file_may_say_it_as_the_command_line_does() {
        let text =
            "peer = 'a:1'\nlabel = ['zone=a', 'rack=1']\nmemory-limit = 1048576\nstore-limit = '4GiB'\nmdns = true";
        let FileOptions { node, agent, .. } = parse_config(text).unwrap();
        assert_eq!((node.peer, node.label.len(), node.mdns), (vec!["a:1".to_string()], 2, Some(true)));
        assert_eq!(size("", agent.memory_limit.as_deref()).unwrap(), Some(1 << 20));
        assert_eq!(size("", agent.store_limit.as_deref()).unwrap(), Some(4 << 30));
    }

    #[test]
    fn what_is_empty_says_nothing() {
        let FileOptions { node, agent, .. } = parse_config("name = ''\nstate = ''\nmemory-limit = ''").unwrap();
        assert_eq!((node.name, node.state, agent.memory_limit), (None, None, None));
        let words = |text: &str| text.split(',').map(str::to_string).collect::<Vec<_>>();
        assert_eq!(list(words("a, b,"), words("c")), ["a", "b"]);
        assert_eq!(list(words(","), words("c")), ["c"]);
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        for (text, key) in [
            ("peer = 5", "'peer'"),
            ("peer = [5]", "'peer'"),
            ("name = ['a']", "'name'"),
            ("mdns = 'yes'", "'mdns'"),
            ("data-listen = 'here'", "'data-listen'"),
            ("memory-limit = 1.5", "'memory-limit'"),
            ("[agent]\nname = 'a'", "'agent'"),
            ("colour = ''", "no option 'colour'"),
            ("name = 'a'\n\npeer =", "line 3"),
        ] {
            let refusal = refusal(text);
            assert!(refusal.contains(key) && !refusal.contains('\n'), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_passing_node_leaves_the_agent_what_is_its_own() {
        let text = "mesh-key = 'k'\npeer = 'a:1'\nname = 'n'\nstate = 's'\nlisten = '0.0.0.0:1'\n\
            external = '/ip4/1.2.3.4/tcp/1'\ndata-listen = '0.0.0.0:2'\ndata-advertise = '1.2.3.4:2'";
        let shared = parse_config(text).unwrap().node.shared();
        assert_eq!((shared.mesh_key, shared.peer), (Some("k".into()), vec!["a:1".to_string()]));
        assert_eq!(shared.name, Some("n".to_string()));
        assert_eq!((shared.state, shared.data_listen, shared.data_advertise), (None, None, None));
        assert!(shared.listen.is_empty() && shared.external.is_empty());
    }
}
