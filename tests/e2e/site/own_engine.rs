//! An engine inside the test: its memory can be looked at and spoilt, and it pauses for as long as
//! the test likes.

use super::{Agent, CHANNEL, Checkpoint, PATIENCE};
use aquifer_engine::{BindingSpec, EngineClient, ReleaseInfo, Stopper, Switch, TensorInfo, layout_for};
use aquifer_memory::{Mapping, Span};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

pub(crate) struct OwnEngine {
    memory: Span,
    tensors: Vec<(TensorInfo, BindingSpec)>,
    told: Receiver<Told>,
    go_on: Sender<()>,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

/// What the agent told it, and of which manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Hydrated(String),
    /// And it stands still until [`OwnEngine::go_on`].
    Pause(String),
    Resume(String),
}

impl OwnEngine {
    pub(crate) fn start(agent: &Agent) -> Self {
        let channel_name = CHANNEL.parse().expect("a channel");
        let mut client = EngineClient::connect(&agent.socket, "own", &channel_name).expect("an agent");
        let manifest = client.manifest().expect("a manifest");
        let (bytes, bindings) = layout_for(&manifest.tensors, 0).expect("a layout");
        let (mapping, fd) = Mapping::memfd("own-engine", bytes).expect("memory");
        client.register(0, fd, bytes, true).expect("a region");
        client.bind(bindings.clone()).expect("bindings");
        client.hydrate().expect("the end of registration");
        let ((tell, told), (go_on, wait)) = (channel(), channel());
        let stopper = client.stopper();
        let thread = std::thread::spawn(move || client.run(&mut Obedient { tell, wait }).expect("a healthy engine"));
        let tensors = manifest.tensors.into_iter().zip(bindings).collect();
        OwnEngine { memory: mapping.span(), tensors, told, go_on, stopper, thread: Some(thread) }
    }

    pub(crate) fn next(&self) -> Told {
        self.told.recv_timeout(PATIENCE).expect("the agent tells it something")
    }

    pub(crate) fn is_told_nothing(&self) -> bool {
        self.told.try_recv().is_err()
    }

    /// Ends a pause.
    pub(crate) fn go_on(&self) {
        self.go_on.send(()).expect("the engine waits for it");
    }

    pub(crate) fn assert_holds(&self, checkpoint: &Checkpoint) {
        let hash = |(tensor, binding): &(TensorInfo, BindingSpec)| {
            let bytes = self.memory.slice(binding.offset..binding.offset + tensor.bytes).expect("its memory");
            (tensor.name.clone(), bytes.hash().expect("its bytes").to_string())
        };
        let found: BTreeMap<String, String> = self.tensors.iter().map(hash).collect();
        assert_eq!(found, checkpoint.tensors());
    }

    /// Leaves a tensor written over up to its last byte: every chunk of it is wrong.
    pub(crate) fn spoil(&self, tensor: &str) {
        let (info, binding) = self.tensors.iter().find(|(t, _)| t.name == tensor).expect("a tensor of that name");
        let most = usize::try_from(info.bytes - 1).expect("a small tensor");
        self.memory.write(binding.offset, &vec![0xa5; most]).expect("its memory");
    }
}

impl Drop for OwnEngine {
    fn drop(&mut self) {
        self.stopper.stop();
        // A pause that nobody ended ends with its channel.
        drop(std::mem::replace(&mut self.go_on, channel().0));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Obedient {
    tell: Sender<Told>,
    wait: Receiver<()>,
}

impl Obedient {
    fn tell(&self, told: Told) {
        // The test may have lost interest.
        let _ = self.tell.send(told);
    }
}

impl Switch for Obedient {
    fn hydrated(&mut self, release: &ReleaseInfo) {
        self.tell(Told::Hydrated(release.manifest.to_string()));
    }

    fn pause(&mut self, release: &ReleaseInfo) -> Result<(), String> {
        self.tell(Told::Pause(release.manifest.to_string()));
        self.wait.recv().map_err(|_| "the test is over".to_string())
    }

    fn resume(&mut self, release: &ReleaseInfo) -> Result<(), String> {
        self.tell(Told::Resume(release.manifest.to_string()));
        Ok(())
    }
}
