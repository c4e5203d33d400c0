//! The command line.

use crate::commands::bench::args::Bench;
use crate::options::{AgentOptions, NodeOptions, OperationOptions};
use crate::output::{ErrorStream, plain, tell};
use crate::policy::PolicyOptions;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format;

/// A peer-to-peer mesh that keeps the weights of a fleet of inference engines current.
///
/// Start with `aquifer demo`: a whole mesh on this machine, in one command. For a mesh of your own:
/// `keygen mesh` and `keygen publisher` make the keys, `publish` announces and serves a checkpoint,
/// `agent` runs on every node beside its engines, `status` shows what it does.
///
/// Exit codes: 0 done; 1 failed, with the reason on the error stream; 2 wrong usage; 3 not done in
/// the time given; 4 what was compared or verified differs; 5 a release was given up.
#[derive(Debug, Parser)]
#[command(name = "aquifer", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// What to log, on the error stream: error, warn, info, debug, or a filter such as
    /// aquifer_mesh=debug [default: info]
    #[arg(long, global = true, env = "AQUIFER_LOG", value_name = "LEVEL", help_heading = "General")]
    pub(crate) log: Option<String>,
    /// TOML file with options of an agent, named like its flags; `publish` and `pull` take the mesh
    /// key, peers, name, labels and trusted publishers from it [default:
    /// ~/.config/aquifer/aquifer.toml or /etc/aquifer/aquifer.toml, if there]
    #[arg(long, global = true, env = "AQUIFER_CONFIG", value_name = "FILE", help_heading = "General")]
    pub(crate) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// The command line, completed from the environment. Ends the program where that is asked for
    /// or cannot be understood.
    pub(crate) fn from_arguments() -> Self {
        let matches = without_empty_variables(Cli::command()).get_matches();
        Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// An empty variable is one that is not set, as Docker and systemd files often have it.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| match arg.get_env().is_some_and(is_empty) {
            true => arg.env(None::<&'static str>),
            false => arg,
        })
        .mut_subcommands(without_empty_variables)
}

const AGENT_EXAMPLE: &str = "Example:
  aquifer agent --channel prod/model --trust PUBLIC_KEY \\
      --mesh-key mesh.key --peer HOST:7401";

const PUBLISH_EXAMPLE: &str = "Example:
  aquifer publish ./checkpoint --channel prod/model \\
      --mesh-key mesh.key --publisher-key publisher.key --listen 0.0.0.0:7401";

const PULL_EXAMPLE: &str = "Example:
  aquifer pull prod/model --to ./copy --trust PUBLIC_KEY \\
      --mesh-key mesh.key --peer HOST:7401";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run this node's daemon: follow channels, fill the memory of engines, serve other nodes
    #[command(after_help = AGENT_EXAMPLE)]
    Agent {
        #[command(flatten)]
        node: NodeOptions,
        #[command(flatten)]
        agent: AgentOptions,
        #[command(flatten)]
        operation: OperationOptions,
    },
    /// Hash, sign and announce a checkpoint, and go on serving it
    #[command(after_help = PUBLISH_EXAMPLE)]
    Publish(Publish),
    /// Rebuild a release's files in a directory, bit for bit
    #[command(after_help = PULL_EXAMPLE)]
    Pull(Pull),
    /// Give out what an earlier release of a channel had, as a new one. Nodes have kept what they need for it
    Rollback(Rollback),
    /// Say of a release that waits for it: switch now, or never
    Release {
        #[command(subcommand)]
        command: ReleaseCommand,
    },
    /// Show a channel's releases: whose they are, how each node fared, how long it took
    Releases {
        channel: String,
        /// The agent's socket [default: the one `aquifer agent` takes by default]
        #[arg(long, env = "AQUIFER_SOCKET", value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Have this machine's agent leave well: it takes on nothing new, hands over what nobody else has, and ends
    Drain {
        /// Leave after so long, done or not [default: as the agent was told when it started, 25s]
        #[arg(long, value_name = "DURATION")]
        grace: Option<String>,
        /// The agent's socket [default: the one `aquifer agent` takes by default]
        #[arg(long, env = "AQUIFER_SOCKET", value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show this machine's agent: engines, peers, progress
    Status {
        /// The agent's socket [default: the one `aquifer agent` takes by default]
        #[arg(long, env = "AQUIFER_SOCKET", value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Renew the picture until interrupted, also while the agent restarts
        #[arg(long)]
        watch: bool,
        /// Print JSON; with --watch, one line each time
        #[arg(long)]
        json: bool,
    },
    /// Look inside a checkpoint's manifest, compare two, check files against one
    Manifest {
        #[command(subcommand)]
        command: ManifestCommand,
    },
    /// Make the keys of a mesh and of publishers
    Keygen {
        #[command(subcommand)]
        command: KeygenCommand,
    },
    /// What this machine offers for moving chunks, what Aquifer will use, what would make it faster
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// A whole mesh on this machine: publisher, nodes, engines, an update, all checked
    Demo(Demo),
    /// An engine for the demo: registers memory, hydrates, reports
    #[command(hide = true)]
    DemoEngine(DemoEngine),
    /// What this machine can do, and how near Aquifer comes to it: measured side by side
    Bench(Bench),
    /// A process of a bench: does what it reads from its input
    #[command(hide = true)]
    BenchPart { name: String },
    /// This program with other arguments, until whoever started it ends
    #[command(hide = true)]
    Tethered {
        parent: i32,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Publish {
    /// A .safetensors file, or a directory with a checkpoint
    pub(crate) path: PathBuf,
    /// The channel to publish to: a name of your choice, such as prod/model
    #[arg(long)]
    pub(crate) channel: String,
    /// File with the publisher's secret key (`aquifer keygen publisher`)
    #[arg(long, env = "AQUIFER_PUBLISHER_KEY", value_name = "FILE")]
    pub(crate) publisher_key: PathBuf,
    /// A note for people, carried in the release
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) note: String,
    #[command(flatten)]
    pub(crate) rollout: PolicyOptions,
    /// Leave out files and directories that match, such as 'optimizer*'. May be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(crate) exclude: Vec<String>,
    /// Stop serving once this many other nodes hold all of it
    #[arg(long, value_name = "NODES")]
    pub(crate) until_held_by: Option<usize>,
    /// Print JSON lines instead of text
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) operation: OperationOptions,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// Who signs, for which channel, and which agent passes it on.
#[derive(Debug, clap::Args)]
pub(crate) struct Operator {
    /// The channel
    pub(crate) channel: String,
    /// File with a secret key that the channel's nodes trust (`aquifer keygen publisher`)
    #[arg(long, env = "AQUIFER_PUBLISHER_KEY", value_name = "FILE")]
    pub(crate) publisher_key: PathBuf,
    /// The socket of an agent that follows the channel [default: the one `aquifer agent` takes by default]
    #[arg(long, env = "AQUIFER_SOCKET", value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Rollback {
    #[command(flatten)]
    pub(crate) operator: Operator,
    /// The number of the release to go back to [default: what there was before the newest]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) to: Option<u64>,
    /// A note for people, carried in the release
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) note: String,
    /// Print JSON lines instead of text
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) rollout: PolicyOptions,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReleaseCommand {
    /// All nodes that take it switch to it
    Commit(WordAbout),
    /// All nodes stay with what they have
    Abort(WordAbout),
}

#[derive(Debug, clap::Args)]
pub(crate) struct WordAbout {
    #[command(flatten)]
    pub(crate) operator: Operator,
    /// The release's number [default: the newest that waits for a word]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) seq: Option<u64>,
    /// Why, for people
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) reason: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Pull {
    /// A channel, for its newest release, or the hash of a manifest
    pub(crate) what: String,
    /// The directory to rebuild the files in
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Give up after this many seconds (exit code 3)
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
    /// Print JSON lines instead of text
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ManifestCommand {
    /// Show what a checkpoint or manifest consists of
    Show {
        /// A checkpoint (file or directory), or a manifest file
        target: PathBuf,
        /// Also write the manifest to this file
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Print JSON, with every chunk's hash
        #[arg(long)]
        json: bool,
    },
    /// Compare two checkpoints or manifests: what changed, and how much would move. Exit code 4 if
    /// they differ
    Diff {
        /// A checkpoint (file or directory), or a manifest file
        old: PathBuf,
        /// The same, of the later one
        new: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check the files in a directory against a manifest. Exit code 4 if they differ
    Verify {
        /// A manifest file, or another checkpoint to compare with
        manifest: PathBuf,
        /// The directory that the manifest's files lie in
        dir: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeygenCommand {
    /// Make the secret that every node of a mesh shares
    Mesh {
        /// Write it to this file [default: print it]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Make the secret that a publisher signs releases with; prints the public key for --trust
    Publisher {
        /// Write the secret to this file
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the public key of a publisher's secret
    Public {
        /// The file that `keygen publisher` wrote
        secret: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// The checkpoint to distribute [default: a small transformer with random weights]
    #[arg(long, value_name = "PATH")]
    pub(crate) checkpoint: Option<PathBuf>,
    /// How many nodes, beside the publisher and the latecomer
    #[arg(long, default_value_t = 3)]
    pub(crate) nodes: usize,
    /// Size of the made-up checkpoint
    #[arg(long, default_value = "256MiB", value_name = "SIZE")]
    pub(crate) size: String,
    /// Move every chunk by this way alone, and fail if one came by another: shm, rdma or tcp [default: the
    /// best that works]
    #[arg(long, value_name = "WAY", hide_possible_values = true)]
    pub(crate) over: Option<Over>,
    /// Keep the working directory and say where it is
    #[arg(long)]
    pub(crate) keep: bool,
    /// Print the table as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A way for chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Over {
    Shm,
    Rdma,
    Tcp,
}

impl Over {
    /// As in `status`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Over::Shm => "shm",
            Over::Rdma => "rdma",
            Over::Tcp => "tcp",
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct DemoEngine {
    #[arg(long)]
    pub(crate) socket: PathBuf,
    #[arg(long)]
    pub(crate) channel: String,
    #[arg(long)]
    pub(crate) name: String,
}

/// Logs go to the error stream; programs' output stays clean.
pub(crate) fn init_logging(filter: Option<&str>) {
    let filter = EnvFilter::try_new(filter.unwrap_or("info,libp2p=warn")).unwrap_or_else(|e| {
        tell(&format!("aquifer: --log is not understood ({e}); logging at 'info'"));
        EnvFilter::new("info,libp2p=warn")
    });
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    // A line of the log stays one line, whatever names it tells of.
    let fields = format::debug_fn(|writer, field, value| match (field.name(), plain(&format!("{value:?}"))) {
        ("message", text) => writer.write_str(&text),
        (name, text) => write!(writer, "{name}={text}"),
    });
    tracing_subscriber::fmt()
        .fmt_fields(fields.delimited(" "))
        .with_env_filter(filter)
        .with_writer(|| ErrorStream)
        .with_ansi(colours)
        .with_target(false)
        // It would tell of a closed error stream on that stream, and panic.
        .log_internal_errors(false)
        .init();
}
