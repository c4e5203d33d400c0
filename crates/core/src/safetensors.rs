//! The safetensors header: eight bytes of length, then JSON.
//!
//! Our own reader, because the checkpoint of a stranger must be carried even where the reference
//! crate stops: dtypes it does not know. It is no less strict elsewhere: the tensors must cover
//! the data exactly, without overlap or hole, as the format demands.
//! Format: <https://github.com/huggingface/safetensors#format>

use crate::dtype::Dtype;
use crate::limits::{NAME_BYTES_MAX, SAFETENSORS_HEADER_BYTES_MAX, TENSOR_DIMS_MAX};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use thiserror::Error;

/// Bytes of the length field in front of the JSON.
pub const LENGTH_BYTES: u64 = 8;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum SafetensorsError {
    #[error("too short to be safetensors: {0} bytes")]
    Short(u64),
    #[error("its header claims {claimed} bytes, allowed are {SAFETENSORS_HEADER_BYTES_MAX}")]
    HeaderTooLong { claimed: u64 },
    #[error("truncated: its header claims {claimed} bytes, the file has {left} after the length")]
    HeaderTruncated { claimed: u64, left: u64 },
    #[error("its header is not valid: {0}")]
    Json(String),
    #[error("tensor '{name}': {reason}")]
    Tensor { name: String, reason: String },
    #[error("tensors '{a}' and '{b}' overlap")]
    Overlap { a: String, b: String },
    #[error("{bytes} bytes before {before} belong to no tensor")]
    Hole { bytes: u64, before: String },
    #[error("truncated: its tensors need {needed} bytes, the file holds {found}")]
    Truncated { needed: u64, found: u64 },
}

/// One tensor of a file; `begin..end` counts from the start of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpan {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub begin: u64,
    pub end: u64,
}

/// A checked header: tensors in the order of their bytes, covering `data_begin..file_bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes before the first tensor: length field and JSON.
    pub data_begin: u64,
    pub tensors: Vec<TensorSpan>,
}

/// How many bytes the header takes in all, from the first eight bytes of a file of
/// `file_bytes`: what to read before calling [`parse`].
pub fn header_bytes(first: &[u8; 8], file_bytes: u64) -> Result<u64, SafetensorsError> {
    let claimed = u64::from_le_bytes(*first);
    let left = file_bytes.checked_sub(LENGTH_BYTES).ok_or(SafetensorsError::Short(file_bytes))?;
    if claimed > SAFETENSORS_HEADER_BYTES_MAX {
        return Err(SafetensorsError::HeaderTooLong { claimed });
    }
    if claimed > left {
        return Err(SafetensorsError::HeaderTruncated { claimed, left });
    }
    Ok(LENGTH_BYTES + claimed)
}

/// Reads the header of a file of `file_bytes`; `header` is its first [`header_bytes`] bytes.
pub fn parse(header: &[u8], file_bytes: u64) -> Result<Header, SafetensorsError> {
    let json = header.get(8..).ok_or(SafetensorsError::Short(file_bytes))?;
    let raw: RawHeader = serde_json::from_slice(json).map_err(|e| SafetensorsError::Json(e.to_string()))?;
    let data_begin = header.len() as u64;
    let mut tensors =
        raw.0.into_iter().map(|(name, raw)| span(name, raw, data_begin)).collect::<Result<Vec<_>, _>>()?;
    // Empty tensors sort before what begins where they do; names break remaining ties.
    tensors.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    check_names(&tensors)?;
    check_cover(&tensors, data_begin, file_bytes)?;
    Ok(Header { data_begin, tensors })
}

fn span(name: String, raw: RawTensor<'_>, data_begin: u64) -> Result<TensorSpan, SafetensorsError> {
    let refuse = |reason: String| SafetensorsError::Tensor { name: name.chars().take(256).collect(), reason };
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(refuse(format!("its name has {} bytes, allowed are 1 to {NAME_BYTES_MAX}", name.len())));
    }
    if raw.shape.len() > TENSOR_DIMS_MAX {
        return Err(refuse(format!("{} dimensions, allowed are {TENSOR_DIMS_MAX}", raw.shape.len())));
    }
    let [begin, end] = raw.data_offsets;
    let bytes =
        end.checked_sub(begin).ok_or_else(|| refuse(format!("it ends at {end}, before it begins at {begin}")))?;
    let dtype = Dtype::new(raw.dtype);
    match dtype.tensor_bytes(&raw.shape) {
        Some(Err(reason)) => return Err(refuse(reason.into())),
        Some(Ok(needed)) if needed != bytes => {
            return Err(refuse(format!(
                "{dtype} of shape {:?} is {needed} bytes, its offsets span {bytes}",
                raw.shape
            )));
        }
        _ => {}
    }
    let shift =
        |offset: u64| data_begin.checked_add(offset).ok_or_else(|| refuse("its offsets do not fit 64 bits".into()));
    Ok(TensorSpan { begin: shift(begin)?, end: shift(end)?, dtype, shape: raw.shape, name })
}

/// A name that appears twice is an error, not a silent choice.
fn check_names(tensors: &[TensorSpan]) -> Result<(), SafetensorsError> {
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    // Stable, because that sort makes use of what is in order already, as most headers are.
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(SafetensorsError::Json(format!("tensor '{}' appears twice", pair[0]))),
        None => Ok(()),
    }
}

fn check_cover(tensors: &[TensorSpan], data_begin: u64, file_bytes: u64) -> Result<(), SafetensorsError> {
    let mut reached = data_begin;
    let mut last = "";
    for t in tensors {
        if t.begin < reached {
            return Err(SafetensorsError::Overlap { a: last.into(), b: t.name.clone() });
        }
        if t.begin > reached {
            return Err(SafetensorsError::Hole { bytes: t.begin - reached, before: format!("tensor '{}'", t.name) });
        }
        (reached, last) = (t.end, &t.name);
    }
    if reached > file_bytes {
        return Err(SafetensorsError::Truncated { needed: reached, found: file_bytes });
    }
    if reached < file_bytes {
        return Err(SafetensorsError::Hole { bytes: file_bytes - reached, before: "the end of the file".into() });
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// All entries but `__metadata__`, in the order of the file.
struct RawHeader<'a>(Vec<(String, RawTensor<'a>)>);

impl<'de> Deserialize<'de> for RawHeader<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a safetensors header object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader<'de>, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                        continue;
                    }
                    tensors.push((name, map.next_value()?));
                }
                Ok(RawHeader(tensors))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(json: &str) -> Vec<u8> {
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()
    }

    fn parse_json(json: &str, data: u64) -> Result<Header, SafetensorsError> {
        let header = bytes(json);
        parse(&header, header.len() as u64 + data)
    }

    #[test]
    fn every_kind_of_tensor() {
        let header = parse_json(
            r#"{"__metadata__":{"format":"pt"},
                "f4":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]},
                "scalar":{"dtype":"F32","shape":[],"data_offsets":[3,7]},
                "empty":{"dtype":"BF16","shape":[0,4],"data_offsets":[7,7]},
                "odd":{"dtype":"Q3_K","shape":[5],"data_offsets":[7,9]}}"#,
            9,
        )
        .unwrap();
        let names: Vec<_> = header.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["f4", "scalar", "empty", "odd"]);
    }

    #[test]
    fn lies_are_refused() {
        let refused = |json: &str, data: u64, why: &str| {
            let error = parse_json(json, data).unwrap_err().to_string();
            assert!(error.contains(why), "{error} does not say {why}");
        };
        refused(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
            6,
            "overlap",
        );
        refused(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#, 6, "belong to no tensor");
        refused(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 3, "truncated");
        refused(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 5, "end of the file");
        refused(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}"#, 4, "is 16 bytes");
        refused(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#, 4, "before it begins");
        refused(r#"{"a":{"dtype":"U8","shape":[18446744073709551615,9],"data_offsets":[0,4]}}"#, 4, "64 bits");
        refused(r#"{"a":{"dtype":"Q","shape":[1],"data_offsets":[0,18446744073709551615]}}"#, 4, "64 bits");
        refused(
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
            1,
            "twice",
        );
        refused(r#"[1]"#, 0, "header object");
        refused("{", 0, "not valid");
    }

    #[test]
    fn lying_lengths_are_refused_before_anything_is_read() {
        let claim = |n: u64, file: u64| header_bytes(&n.to_le_bytes(), file);
        assert_eq!(claim(u64::MAX, 100), Err(SafetensorsError::HeaderTooLong { claimed: u64::MAX }));
        assert_eq!(claim(93, 100), Err(SafetensorsError::HeaderTruncated { claimed: 93, left: 92 }));
        assert_eq!(claim(0, 3), Err(SafetensorsError::Short(3)));
        assert_eq!(claim(92, 100), Ok(100));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..200), len in any::<u64>()) {
            let _ = parse(&garbage, len);
        }
    }
}
