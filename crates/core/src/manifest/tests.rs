use super::*;
use proptest::prelude::*;

fn chunk(byte: u8, len: u32) -> Chunk {
    Chunk { hash: ChunkHash::of(&[byte]), len }
}

fn tensor(name: &str, chunks: Vec<Chunk>, shape: &[u64]) -> TensorEntry {
    TensorEntry { name: name.into(), dtype: Dtype::new("U8"), shape: shape.into(), content: Content::Chunks(chunks) }
}

/// A tensor of `len` bytes from `begin` on of a pack.
fn packed(name: &str, pack: u32, begin: u32, len: u32) -> TensorEntry {
    let content = Content::Packed(Packed { pack, begin, len });
    TensorEntry { name: name.into(), dtype: Dtype::new("U8"), shape: vec![len.into()], content }
}

fn file(path: &str, parts: Vec<Part>) -> FileEntry {
    FileEntry { path: path.into(), parts }
}

fn good() -> Manifest {
    Manifest::new(
        vec![
            file("a/b.safetensors", vec![Part::Bytes(vec![chunk(0, 8)]), Part::Tensor(0)]),
            file("c.json", vec![Part::Bytes(vec![chunk(1, 3)])]),
        ],
        vec![tensor("w", vec![chunk(2, 4), chunk(3, 2)], &[2, 3])],
        vec![],
    )
    .unwrap()
}

#[test]
fn survives_its_bytes() {
    let bytes = good().encode();
    assert_eq!(Manifest::decode_named(&bytes, ManifestHash::of(&bytes)), Ok(good()));
    assert_eq!(good().bytes(), 8 + 6 + 3);
}

#[test]
fn another_hash_is_refused() {
    let error = Manifest::decode_named(&good().encode(), ManifestHash::of(b"x")).unwrap_err();
    assert!(matches!(error, ManifestError::Hash { .. }));
}

#[test]
fn lies_are_refused() {
    let refused = |files: Vec<FileEntry>, tensors: Vec<TensorEntry>, why: &str| {
        let error = Manifest::new(files, tensors, vec![]).unwrap_err().to_string();
        assert!(error.contains(why), "{error} does not say {why}");
    };
    let w = || tensor("w", vec![chunk(2, 6)], &[2, 3]);
    refused(vec![], vec![tensor("w", vec![chunk(2, 5)], &[2, 3])], "its chunks are 5");
    refused(vec![], vec![w(), w()], "unique and sorted");
    refused(vec![], vec![tensor("w", vec![chunk(2, 0)], &[0])], "length 0");
    refused(vec![], vec![tensor("w", vec![chunk(2, u32::MAX)], &[1])], "length 4294967295");
    refused(vec![], vec![tensor("w", vec![], &[u64::MAX, 2, 1 << 40])], "64 bits");
    refused(vec![file("../x", vec![])], vec![], "relative");
    refused(vec![file("/x", vec![])], vec![], "relative");
    refused(vec![file("x", vec![Part::Tensor(0)])], vec![], "tensor 0 of 0");
    refused(vec![file("x", vec![Part::Tensor(0), Part::Tensor(0)])], vec![w()], "already");
    refused(vec![file("x", vec![]), file("x/y", vec![])], vec![], "cannot hold it");
    refused(vec![file("x", vec![Part::Bytes(vec![chunk(1, 3), chunk(1, 4)])])], vec![], "two lengths");
}

/// Two packs in one file, the second before the first, and a third that is in no file.
fn with_packs() -> (Vec<FileEntry>, Vec<TensorEntry>, Vec<Chunk>) {
    let parts = vec![Part::Pack(1), Part::Tensor(2), Part::Pack(0)];
    let tensors = vec![
        packed("a", 0, 0, 3),
        packed("b", 1, 4, 1),
        tensor("c", vec![chunk(2, 6)], &[6]),
        packed("d", 1, 0, 4),
        packed("e", 0, 3, 2),
        packed("f", 2, 0, 1),
        packed("g", 2, 1, 1),
    ];
    (vec![file("m", parts)], tensors, vec![chunk(10, 5), chunk(11, 5), chunk(12, 2)])
}

#[test]
fn tensors_share_packs() {
    let (files, tensors, packs) = with_packs();
    let manifest = Manifest::new(files, tensors, packs).unwrap();
    assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest));
    assert_eq!(manifest.bytes(), 5 + 6 + 5);
    assert_eq!(manifest.tensor("e").unwrap().bytes(), 2);
    let layout = crate::Layout::of(&manifest);
    let at = |e: &crate::Extent| (e.offset, layout.chunk(e.chunk).hash, e.begin, e.len);
    let of_file: Vec<_> = layout.files[0].iter().map(at).collect();
    let [first, second, own] = [10u8, 11, 2].map(|b| ChunkHash::of(&[b]));
    assert_eq!(of_file, [(0, second, 0, 5), (5, own, 0, 6), (11, first, 0, 5)]);
    assert_eq!(layout.tensors[1].iter().map(at).collect::<Vec<_>>(), [(0, second, 4, 1)]);
}

#[test]
fn lies_about_packs_are_refused() {
    type Parts = (Vec<FileEntry>, Vec<TensorEntry>, Vec<Chunk>);
    let refused = |change: &dyn Fn(&mut Parts), why: &str| {
        let mut parts = with_packs();
        change(&mut parts);
        let error = Manifest::new(parts.0, parts.1, parts.2).unwrap_err().to_string();
        assert!(error.contains(why), "{error} does not say {why}");
    };
    refused(&|p| p.1[0] = packed("a", 3, 0, 3), "is in pack 3 of 3");
    refused(&|p| p.1[0] = packed("a", u32::MAX, 0, 3), "is in pack 4294967295 of 3");
    refused(&|p| p.1[0] = packed("a", 0, 0, 4), "where 4 was next");
    refused(&|p| p.1[0] = packed("a", 0, 0, 2), "where 2 was next");
    refused(&|p| p.1[0] = packed("a", 0, 1, 2), "where 0 was next");
    refused(&|p| p.1[0] = packed("a", 0, 3, 0), "where 0 was next");
    refused(&|p| p.1[4] = packed("e", 0, 3, 0), "where 3 was next");
    refused(&|p| p.1[4] = packed("e", 0, 3, 3), "has 5 bytes, its tensors 6");
    refused(&|p| p.1[4] = packed("e", 0, u32::MAX, u32::MAX), "where 3 was next");
    refused(&|p| p.1[4] = packed("e", 0, 3, u32::MAX), "has 5 bytes");
    refused(&|p| p.1[4] = tensor("e", vec![chunk(5, 2)], &[2]), "has 5 bytes, its tensors 3");
    refused(&|p| p.1[4].shape = vec![3], "is 3 bytes");
    refused(&|p| p.2.push(chunk(13, 1)), "its tensors 0");
    refused(&|p| p.2[0].len = u32::MAX, "length 4294967295");
    refused(&|p| p.2[0].hash = chunk(2, 6).hash, "two lengths");
    refused(&|p| p.0[0].parts[0] = Part::Pack(3), "pack 3 of 3");
    refused(&|p| p.0[0].parts[0] = Part::Pack(0), "names pack 0, which is in a file already");
    refused(&|p| p.0.push(file("n", vec![Part::Pack(0)])), "names pack 0, which is in a file already");
    refused(&|p| p.0[0].parts.push(Part::Tensor(0)), "names tensor 0, which is in pack 0");
    let lone = |p: &mut Parts| drop((p.1.pop(), p.2[2].len = 1));
    refused(&lone, "a single tensor");
    let swapped = |p: &mut Parts| {
        p.2.swap(0, 1);
        for (i, pack) in [(0, 1), (1, 0), (3, 0), (4, 1)] {
            let Content::Packed(packed) = &mut p.1[i].content else { panic!("tensor {i} is in a pack") };
            packed.pack = pack;
        }
    };
    refused(&swapped, "before that of the pack before");
}

prop_compose! {
    /// Tensors of a manifest, as (pack or none, length), and the seed of a byte to change.
    fn packings()(lens in prop::collection::vec((0usize..6, 1u32..9), 2..24), at in any::<u64>(), to in any::<u8>())
        -> (Vec<(usize, u32)>, u64, u8) {
        (lens, at, to)
    }
}

/// A manifest whose tensors lie in the packs they ask for.
fn manifest_of(wanted: &[(usize, u32)]) -> Manifest {
    let mut packs: Vec<(usize, u32)> = Vec::new();
    let mut tensors = Vec::new();
    for (i, &(group, len)) in wanted.iter().enumerate() {
        let name = format!("t{i:02}");
        let alone = wanted.iter().filter(|(other, _)| *other == group).count() < 2;
        if group == 0 || alone {
            tensors.push(tensor(&name, vec![Chunk { hash: ChunkHash::of(name.as_bytes()), len }], &[len.into()]));
            continue;
        }
        let at = packs.iter().position(|(other, _)| *other == group).unwrap_or(packs.len());
        if at == packs.len() {
            packs.push((group, 0));
        }
        tensors.push(packed(&name, u32::try_from(at).unwrap(), packs[at].1, len));
        packs[at].1 += len;
    }
    let hash = |group: usize| ChunkHash::of(&group.to_le_bytes());
    let chunks: Vec<Chunk> = packs.iter().map(|&(group, len)| Chunk { hash: hash(group), len }).collect();
    let parts = (0u32..).zip(&chunks).map(|(i, _)| Part::Pack(i)).collect();
    Manifest::new(vec![file("m", parts)], tensors, chunks).unwrap()
}

proptest! {
    #[test]
    fn packed_manifests_survive_and_their_extents_fill_the_packs((wanted, _, _) in packings()) {
        let manifest = manifest_of(&wanted);
        prop_assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest.clone()));
        let layout = crate::Layout::of(&manifest);
        let mut filled = vec![0; layout.chunks.len()];
        for (tensor, extents) in manifest.tensors().iter().zip(&layout.tensors) {
            prop_assert_eq!(extents.iter().map(|e| u64::from(e.len)).sum::<u64>(), tensor.bytes());
            for e in extents {
                prop_assert!(u64::from(e.begin) + u64::from(e.len) <= layout.chunk(e.chunk).len.into());
                filled[e.chunk as usize] += e.len;
            }
        }
        prop_assert!(filled.iter().zip(&layout.chunks).all(|(filled, chunk)| *filled == chunk.len));
    }

    /// What is read from bytes that were tampered with has passed every check, and its bytes are those.
    #[test]
    fn changed_bytes_are_refused_or_canonical((wanted, at, to) in packings()) {
        let mut bytes = manifest_of(&wanted).encode();
        let at = usize::try_from(at % bytes.len() as u64).unwrap();
        bytes[at] = to;
        if let Ok(manifest) = Manifest::decode(&bytes) {
            prop_assert_eq!(manifest.encode(), bytes);
            crate::Layout::of(&manifest);
        }
    }
}
