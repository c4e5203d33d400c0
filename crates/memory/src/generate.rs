//! Checkpoints made up for demonstrations and tests: a small transformer with real names and
//! shapes and random weights, and a variant of any checkpoint with a few tensors changed.

use crate::checkpoint::{PublishError, Source, SourceFile};
use crate::limits::GENERATE_PIECE_BYTES;
use crate::span::clamped;
use aquifer_core::safetensors::TensorSpan;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Writes a Llama-like checkpoint of about `approx_bytes` to `dir`, in the way Hugging Face lays
/// them out: BF16 shards, their index, a config and a placeholder for a tokenizer. Equal arguments
/// give equal bytes.
pub fn generate_checkpoint(dir: &Path, approx_bytes: u64, seed: u64) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let model = Model::of_bytes(approx_bytes);
    let shards = model.shards();
    let count = shards.len();
    let name = |i: usize| format!("model-{:05}-of-{count:05}.safetensors", i + 1);
    let mut weight_map = BTreeMap::new();
    for (i, tensors) in shards.iter().enumerate() {
        write_shard(&dir.join(name(i)), tensors, seed)?;
        weight_map.extend(tensors.iter().map(|t| (t.name.clone(), name(i))));
    }
    let total_size: u64 = shards.iter().flatten().map(Tensor::bytes).sum();
    let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    write_json(&dir.join("model.safetensors.index.json"), &index)?;
    write_json(&dir.join("config.json"), &model.config())?;
    let tokenizer = serde_json::json!({ "version": "1.0", "model": { "type": "BPE", "vocab": {}, "merges": [] } });
    write_json(&dir.join("tokenizer.json"), &tokenizer)
}

/// What [`modify_checkpoint`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modified {
    /// Names of the changed tensors, sorted.
    pub tensors: Vec<String>,
    /// Their bytes.
    pub bytes: u64,
}

/// Writes a copy of the checkpoint at `path` (a directory or a single file) to `out_dir`, with the
/// lowest bits of `tensors` of its tensors changed: a step of training, as far as bytes go.
pub fn modify_checkpoint(path: &Path, out_dir: &Path, seed: u64, tensors: usize) -> Result<Modified, PublishError> {
    let source = Source::open(path, &[])?;
    let chosen = choose(&source, seed, tensors);
    for file in source.files() {
        let out = out_dir.join(&file.path);
        modify_file(file, &out, seed, &chosen).map_err(|source| PublishError::Io {
            action: "write",
            path: out.clone(),
            source,
        })?;
    }
    let bytes = spans(&source).filter(|(_, t)| chosen.contains(&t.name)).map(|(_, t)| t.end - t.begin).sum();
    Ok(Modified { tensors: chosen.into_iter().collect(), bytes })
}

/// Sizes of a transformer, by the names of a Hugging Face config.
struct Model {
    hidden: u64,
    layers: u64,
    vocab: u64,
}

struct Tensor {
    name: String,
    shape: Vec<u64>,
}

impl Tensor {
    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    fn bytes(&self) -> u64 {
        self.elements() * BF16_BYTES
    }

    /// Norms are vectors, and near one.
    fn is_norm(&self) -> bool {
        self.shape.len() == 1
    }
}

const BF16_BYTES: u64 = 2;
const HEAD_DIM: u64 = 64;
/// Guess: a shard of the demo is then a handful of chunks.
const SHARD_BYTES: u64 = 64 << 20;

impl Model {
    /// The widest of a few usual widths that leaves room for four layers.
    fn of_bytes(bytes: u64) -> Self {
        let parameters = bytes / BF16_BYTES;
        let with_layers = |hidden: u64, layers: u64| Model { hidden, layers, vocab: (hidden * 16).min(32_000) };
        let fits = |&hidden: &u64| with_layers(hidden, 4).parameters() <= parameters;
        let hidden = [4096, 2048, 1024, 512, 256, 128].into_iter().find(fits).unwrap_or(64);
        let per_layer = with_layers(hidden, 1).parameters() - with_layers(hidden, 0).parameters();
        let layers = parameters.saturating_sub(with_layers(hidden, 0).parameters()) / per_layer;
        with_layers(hidden, layers.max(1))
    }

    fn intermediate(&self) -> u64 {
        (self.hidden * 8 / 3).next_multiple_of(64)
    }

    fn kv_heads(&self) -> u64 {
        (self.hidden / HEAD_DIM / 4).max(1)
    }

    fn parameters(&self) -> u64 {
        self.tensors().iter().map(Tensor::elements).sum()
    }

    fn tensors(&self) -> Vec<Tensor> {
        let tensor = |name: String, shape: &[u64]| Tensor { name, shape: shape.to_vec() };
        let (h, i, kv) = (self.hidden, self.intermediate(), self.kv_heads() * HEAD_DIM);
        let mut all = vec![tensor("model.embed_tokens.weight".into(), &[self.vocab, h])];
        for layer in 0..self.layers {
            let shapes: [(&str, &[u64]); 9] = [
                ("input_layernorm", &[h]),
                ("mlp.down_proj", &[h, i]),
                ("mlp.gate_proj", &[i, h]),
                ("mlp.up_proj", &[i, h]),
                ("post_attention_layernorm", &[h]),
                ("self_attn.k_proj", &[kv, h]),
                ("self_attn.o_proj", &[h, h]),
                ("self_attn.q_proj", &[h, h]),
                ("self_attn.v_proj", &[kv, h]),
            ];
            all.extend(shapes.map(|(name, shape)| tensor(format!("model.layers.{layer}.{name}.weight"), shape)));
        }
        all.push(tensor("model.norm.weight".into(), &[h]));
        all.push(tensor("lm_head.weight".into(), &[self.vocab, h]));
        all
    }

    /// At least two, of about equal size and at most [`SHARD_BYTES`] where a tensor fits that.
    fn shards(&self) -> Vec<Vec<Tensor>> {
        let most = (self.parameters() * BF16_BYTES).div_ceil(2).min(SHARD_BYTES);
        let mut shards: Vec<Vec<Tensor>> = Vec::new();
        let mut filled = u64::MAX;
        for tensor in self.tensors() {
            if filled.saturating_add(tensor.bytes()) > most {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += tensor.bytes();
            if let Some(shard) = shards.last_mut() {
                shard.push(tensor);
            }
        }
        shards
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate(),
            "num_hidden_layers": self.layers,
            "num_attention_heads": (self.hidden / HEAD_DIM).max(1),
            "num_key_value_heads": self.kv_heads(),
            "head_dim": HEAD_DIM,
            "vocab_size": self.vocab,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
        })
    }
}

fn write_shard(path: &Path, tensors: &[Tensor], seed: u64) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({ "format": "pt" }));
    let mut at = 0;
    for t in tensors {
        let entry = serde_json::json!({ "dtype": "BF16", "shape": t.shape, "data_offsets": [at, at + t.bytes()] });
        header.insert(t.name.clone(), entry);
        at += t.bytes();
    }
    let mut json = serde_json::to_vec(&header)?;
    // The format asks for data aligned to eight bytes, and pads with spaces.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    file.write_all(&json)?;
    let mut piece = vec![0; GENERATE_PIECE_BYTES];
    for t in tensors {
        let mut random = random(seed, &t.name);
        let mut left = t.bytes();
        while left > 0 {
            let n = piece.len().min(clamped(left));
            random.fill(&mut piece[..n]);
            shape_bf16(&mut piece[..n], t.is_norm());
            file.write_all(&piece[..n])?;
            left -= n as u64;
        }
    }
    file.flush()
}

/// Turns random bytes into BF16 values: norms in 1..2, others of either sign below 1/8.
fn shape_bf16(bytes: &mut [u8], norm: bool) {
    for element in bytes.chunks_exact_mut(2) {
        // Sign, eight bits of exponent, seven of mantissa; 127 is the exponent of one.
        (element[0], element[1]) = match norm {
            true => (element[0] & 0x7f | 0x80, 0x3f),
            false => (element[0], element[1] & 0x81 | 0x3c),
        };
    }
}

fn write_json(path: &Path, value: &serde_json::Value) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    fs::write(path, bytes)
}

/// An endless stream of random bytes for `name`, the same for the same seed.
fn random(seed: u64, name: &str) -> blake3::OutputReader {
    let mut hasher = blake3::Hasher::new_derive_key("aquifer 2026 made-up weights");
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    hasher.finalize_xof()
}

fn spans(source: &Source) -> impl Iterator<Item = (&SourceFile, &TensorSpan)> {
    source.files().iter().flat_map(|f| f.header.iter().flat_map(move |h| h.tensors.iter().map(move |t| (f, t))))
}

/// `count` tensors of the model itself that have bytes, in an order that depends on the seed.
fn choose(source: &Source, seed: u64, count: usize) -> BTreeSet<String> {
    let model = spans(source).filter(|(f, t)| f.prefix.is_empty() && t.end > t.begin);
    let mut names: Vec<([u8; 8], &str)> = model
        .map(|(_, t)| {
            let mut key = [0; 8];
            random(seed, &t.name).fill(&mut key);
            (key, t.name.as_str())
        })
        .collect();
    names.sort_unstable();
    names.into_iter().take(count).map(|(_, name)| name.to_string()).collect()
}

fn modify_file(file: &SourceFile, out: &PathBuf, seed: u64, chosen: &BTreeSet<String>) -> io::Result<()> {
    fs::create_dir_all(out.parent().unwrap_or(Path::new(".")))?;
    let target = File::create(out)?;
    let span = file.mapping.span();
    let mut piece = vec![0; GENERATE_PIECE_BYTES];
    let mut copy = |begin: u64, end: u64, change: &mut dyn FnMut(&mut [u8])| -> io::Result<()> {
        let mut at = begin;
        while at < end {
            let n = piece.len().min(clamped(end - at));
            span.read(at, &mut piece[..n])?;
            change(&mut piece[..n]);
            target.write_all_at(&piece[..n], at)?;
            at += n as u64;
        }
        Ok(())
    };
    let Some(header) = &file.header else { return copy(0, span.len(), &mut |_| {}) };
    copy(0, header.data_begin, &mut |_| {})?;
    for t in &header.tensors {
        match file.prefix.is_empty() && chosen.contains(&t.name) {
            false => copy(t.begin, t.end, &mut |_| {})?,
            true => {
                let mut random = random(!seed, &t.name);
                // Pieces are a multiple of every element's size, so each begins with an element.
                let element = clamped(t.dtype.bytes().unwrap_or(1)).max(1);
                copy(t.begin, t.end, &mut |bytes| flip_low_bits(bytes, element, &mut random))?;
            }
        }
    }
    Ok(())
}

/// Flips the lowest bit of about half of the elements (little endian), and always of the first.
fn flip_low_bits(bytes: &mut [u8], element: usize, random: &mut blake3::OutputReader) {
    let mut coins = [0; 1024];
    for (block, elements) in bytes.chunks_mut(element * coins.len()).enumerate() {
        random.fill(&mut coins);
        coins[0] |= u8::from(block == 0);
        elements.chunks_mut(element).zip(&coins).for_each(|(e, coin)| e[0] ^= coin & 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(path: &Path) -> crate::Published {
        Source::open(path, &[]).unwrap().hash(2, &|_| {}).unwrap()
    }

    #[test]
    fn a_checkpoint_of_about_the_size_asked_for() {
        for mib in [1, 16, 70] {
            let dir = tempfile::tempdir().unwrap();
            generate_checkpoint(dir.path(), mib << 20, 7).unwrap();
            let published = publish(dir.path());
            let bytes = published.manifest.bytes();
            assert!(bytes > (mib << 20) * 6 / 10 && bytes < (mib << 20) * 11 / 10, "{bytes} for {mib} MiB");
            let shards = published.files().iter().filter(|f| f.header.is_some()).count();
            assert!(shards >= 2, "{shards} shards");
            assert!(published.manifest.tensor("model.layers.3.mlp.up_proj.weight").is_some());
        }
    }

    #[test]
    fn equal_seeds_give_equal_bytes() {
        let [a, b, c] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        generate_checkpoint(a.path(), 1 << 20, 1).unwrap();
        generate_checkpoint(b.path(), 1 << 20, 1).unwrap();
        generate_checkpoint(c.path(), 1 << 20, 2).unwrap();
        assert_eq!(publish(a.path()).hash, publish(b.path()).hash);
        assert_ne!(publish(a.path()).hash, publish(c.path()).hash);
    }

    #[test]
    fn only_the_chosen_tensors_change() {
        let [a, b] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        generate_checkpoint(a.path(), 4 << 20, 1).unwrap();
        let modified = modify_checkpoint(a.path(), b.path(), 5, 3).unwrap();
        let (old, new) = (publish(a.path()).manifest, publish(b.path()).manifest);
        let pairs = old.tensors().iter().zip(new.tensors());
        let changed: Vec<_> = pairs.filter(|(x, y)| x != y).map(|(x, _)| x.name.clone()).collect();
        assert_eq!(changed, modified.tensors);
        assert_eq!(changed.len(), 3);
        assert_eq!(modified.bytes, changed.iter().map(|n| old.tensor(n).unwrap().bytes()).sum::<u64>());
        assert_eq!(
            old.files().iter().map(|f| &f.path).collect::<Vec<_>>(),
            new.files().iter().map(|f| &f.path).collect::<Vec<_>>()
        );
    }
}
