//! The name of a device. An index means different devices to processes that see different ones.

use std::fmt;
use std::str::FromStr;

/// A GPU's UUID, as `nvidia-smi -L` shows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceUuid(pub [u8; 16]);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not a GPU's UUID: expected 32 hexadecimal digits, as `nvidia-smi -L` shows them after 'GPU-'")]
pub struct UuidParseError(String);

impl fmt::Display for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            if [0, 4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DeviceUuid {
    type Err = UuidParseError;

    /// With or without `GPU-` and dashes: PyTorch leaves the former out.
    fn from_str(text: &str) -> Result<Self, UuidParseError> {
        let error = || UuidParseError(text.to_string());
        let digits = text.strip_prefix("GPU-").unwrap_or(text).replace('-', "");
        if digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(error());
        }
        let value = u128::from_str_radix(&digits, 16).map_err(|_| error())?;
        Ok(DeviceUuid(value.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_as_it_is_written() {
        let text = "GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";
        let uuid: DeviceUuid = text.parse().unwrap();
        assert_eq!(uuid.to_string(), text);
        assert_eq!(text.trim_start_matches("GPU-").parse(), Ok(uuid));
        for wrong in ["", "GPU-", "0", "GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f", "+0f1e2d3c4b5a69788796a5b4c3d2e1f"] {
            assert!(wrong.parse::<DeviceUuid>().is_err(), "{wrong}");
        }
    }
}
