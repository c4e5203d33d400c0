use super::*;
use aquifer_core::Content;
use std::os::unix::fs::symlink;
use std::sync::atomic::AtomicU64;

/// A safetensors file of U8 tensors.
fn safetensors_bytes(tensors: &[(&str, usize)]) -> Vec<u8> {
    let mut at = 0;
    let mut entries = Vec::new();
    for (name, bytes) in tensors {
        entries.push(format!(r#""{name}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{at},{}]}}"#, at + bytes));
        at += bytes;
    }
    let json = format!("{{{}}}", entries.join(","));
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.extend((0..at).map(|i| u8::try_from(i % 241).unwrap()));
    file
}

fn dir(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, bytes) in files {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

fn index(entries: &[(&str, &str)]) -> Vec<u8> {
    let map: BTreeMap<_, _> = entries.iter().copied().collect();
    serde_json::to_vec(&serde_json::json!({ "metadata": {}, "weight_map": map })).unwrap()
}

fn publish(path: &Path) -> Published {
    Source::open(path, &[]).unwrap().hash(2, &|_| {}).unwrap()
}

fn refusal(path: &Path) -> String {
    Source::open(path, &[]).unwrap_err().to_string()
}

fn paths(published: &Published) -> Vec<&str> {
    published.manifest.files().iter().map(|f| f.path.as_str()).collect()
}

fn tensors(published: &Published) -> Vec<&str> {
    published.manifest.tensors().iter().map(|t| t.name.as_str()).collect()
}

#[test]
fn a_single_file_is_served_from_where_it_lies() {
    let bytes = safetensors_bytes(&[("a", 9_000_000), ("b", 10), ("none", 0)]);
    let d = dir(&[("model.safetensors", bytes.clone())]);
    let done = AtomicU64::new(0);
    let source = Source::open(&d.path().join("model.safetensors"), &[]).unwrap();
    assert_eq!(source.bytes(), bytes.len() as u64);
    let count = |n| {
        done.fetch_add(n, Ordering::Relaxed);
    };
    let published = source.hash(2, &count).unwrap();
    assert_eq!(done.into_inner(), bytes.len() as u64);
    assert_eq!(paths(&published), ["model.safetensors"]);
    assert_eq!(tensors(&published), ["a", "b", "none"]);
    assert_eq!(ManifestHash::of(&published.manifest_bytes), published.hash);
    for index in 0..published.layout.len() {
        assert_eq!(published.get(index).unwrap().hash().unwrap(), published.layout.chunk(index).hash);
    }
    assert!(published.get(published.layout.len()).is_none());
}

#[test]
fn a_tensor_that_did_not_change_keeps_its_chunks() {
    let publish_with = |adapter: usize| {
        let files = [
            ("adapter.safetensors", safetensors_bytes(&[("x", adapter)])),
            ("model.safetensors", safetensors_bytes(&[("a", 9_000_000)])),
        ];
        publish(dir(&files).path()).manifest.tensor("a").unwrap().content.clone()
    };
    let before = publish_with(10);
    assert!(matches!(&before, Content::Chunks(chunks) if chunks.len() >= 9_000_000usize.div_ceil(64 << 10)));
    assert_eq!(publish_with(2_000_000), before);
}

#[test]
fn where_it_lies_does_not_matter() {
    let files = [("m.safetensors", safetensors_bytes(&[("a", 100)])), ("config.json", b"{}".to_vec())];
    let (one, two) = (dir(&files), dir(&files));
    assert_eq!(publish(one.path()).hash, publish(two.path()).hash);
}

#[test]
fn an_index_says_what_the_model_is() {
    let d = dir(&[
        ("model.safetensors.index.json", index(&[("a", "x-1.safetensors"), ("b", "x-2.safetensors")])),
        ("x-1.safetensors", safetensors_bytes(&[("a", 10)])),
        ("x-2.safetensors", safetensors_bytes(&[("b", 10), ("unlisted", 4)])),
        ("consolidated.safetensors", safetensors_bytes(&[("a", 10), ("b", 10)])),
        ("extra/adapter.safetensors", safetensors_bytes(&[("a", 3)])),
    ]);
    let expected = [
        "a",
        "b",
        "consolidated.safetensors#a",
        "consolidated.safetensors#b",
        "extra/adapter.safetensors#a",
        "unlisted",
    ];
    assert_eq!(tensors(&publish(d.path())), expected);
}

#[test]
fn without_an_index_the_top_is_the_model() {
    let d = dir(&[
        ("b.safetensors", safetensors_bytes(&[("b", 10)])),
        ("a.safetensors", safetensors_bytes(&[("a", 10)])),
        ("sub/c.safetensors", safetensors_bytes(&[("a", 10)])),
    ]);
    assert_eq!(tensors(&publish(d.path())), ["a", "b", "sub/c.safetensors#a"]);
    fs::copy(d.path().join("a.safetensors"), d.path().join("z.safetensors")).unwrap();
    assert!(refusal(d.path()).contains("both 'a.safetensors' and 'z.safetensors'"));
}

#[test]
fn a_lying_index_is_refused() {
    let shard = safetensors_bytes(&[("a", 10)]);
    let with = |index: Vec<u8>| dir(&[("model.safetensors.index.json", index), ("x.safetensors", shard.clone())]);
    let missing = with(index(&[("a", "x.safetensors"), ("b", "y.safetensors")]));
    assert!(refusal(missing.path()).contains("shard 'y.safetensors', which is not there"));
    let lying = with(index(&[("a", "x.safetensors"), ("b", "x.safetensors")]));
    assert!(refusal(lying.path()).contains("tensor 'b' is in 'x.safetensors'"));
    let outside = with(index(&[("a", "../x.safetensors")]));
    assert!(refusal(outside.path()).contains("which is not there"));
    assert!(refusal(with(b"[]".to_vec()).path()).contains("not a safetensors index"));
}

#[test]
fn bad_safetensors_are_named() {
    let whole = safetensors_bytes(&[("a", 100)]);
    let cases: [(&[u8], &str); 5] = [
        (&whole[..whole.len() - 1], "truncated"),
        (&whole[..20], "truncated"),
        (b"", "too short"),
        (b"12345678901234567890123456789", "claims"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ];
    for (bytes, why) in cases {
        let d = dir(&[("bad.safetensors", bytes.to_vec())]);
        let error = refusal(d.path());
        assert!(error.contains("bad.safetensors") && error.contains(why), "{error} does not say {why}");
    }
}

#[test]
fn what_travels_and_what_does_not() {
    let d = dir(&[
        ("config.json", b"{}".to_vec()),
        (".gitattributes", b"*".to_vec()),
        (".git/HEAD", b"x".to_vec()),
        (".cache/x", b"x".to_vec()),
        (".aquifer-partial/x", b"x".to_vec()),
        (".config.json.swp", b"x".to_vec()),
        ("onnx/model.onnx", b"x".to_vec()),
        ("empty", vec![]),
    ]);
    let blobs = dir(&[("blobs/1234", b"linked".to_vec())]);
    symlink(blobs.path().join("blobs/1234"), d.path().join("linked.txt")).unwrap();
    symlink(blobs.path().join("blobs"), d.path().join("linked")).unwrap();
    symlink(d.path(), d.path().join("onnx/loop")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, d.path().join("fifo"), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let published = publish(d.path());
    let expected = [".gitattributes", "config.json", "empty", "linked.txt", "linked/1234", "onnx/model.onnx"];
    assert_eq!(paths(&published), expected);
    let excluded = Source::open(d.path(), &["onnx".into(), "linked*".into()]).unwrap();
    let names: Vec<_> = excluded.files().iter().map(|f| f.path.as_str()).collect();
    assert_eq!(names, [".gitattributes", "config.json", "empty"]);
}

#[test]
fn unreadable_files_are_named() {
    let d = dir(&[("config.json", b"{}".to_vec())]);
    symlink(d.path().join("gone"), d.path().join("dangling")).unwrap();
    let dangling = refusal(d.path());
    assert!(dangling.contains("dangling: links to") && dangling.contains("--exclude 'dangling'"), "{dangling}");
    assert!(Source::open(d.path(), &["dangling".into()]).is_ok());
    assert!(refusal(&d.path().join("nowhere")).contains("nowhere"));
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("no file"));
}

#[test]
fn a_file_changed_while_served_is_noticed() {
    let d = dir(&[("m.safetensors", safetensors_bytes(&[("a", 100_000)])), ("config.json", b"{}".to_vec())]);
    let source = Source::open(d.path(), &[]).unwrap();
    let late = Source::open(d.path(), &[]).unwrap();
    let published = source.hash(1, &|_| {}).unwrap();
    assert_eq!(published.changed(), [] as [String; 0]);
    let file = fs::OpenOptions::new().write(true).open(d.path().join("m.safetensors")).unwrap();
    file.set_len(1000).unwrap();
    assert!(published.changed()[0].contains("m.safetensors: it had"));
    let tensor = published.layout.tensors[0][0].chunk;
    assert!(published.get(tensor).is_none());
    let config = published.layout.index_of(&ChunkHash::of(b"{}")).unwrap();
    assert!(published.get(config).is_some());
    let error = late.hash(1, &|_| {}).unwrap_err().to_string();
    assert!(error.contains("m.safetensors"), "{error}");
}
