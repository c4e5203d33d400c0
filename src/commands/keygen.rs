//! `aquifer keygen`.

use crate::cli::KeygenCommand;
use crate::keys;
use crate::output::{print_json, print_line};
use anyhow::Result;
use serde_json::json;
use std::process::ExitCode;

pub(crate) fn run(command: KeygenCommand) -> Result<ExitCode> {
    match command {
        KeygenCommand::Mesh { out } => {
            let key = keys::new_mesh_key()?;
            match out {
                None => {
                    print_line(&key.to_text())?;
                }
                Some(path) => {
                    keys::write_secret(&path, &key.to_text())?;
                    print_line(&format!("mesh key {} written to {}", key.fingerprint(), path.display()))?;
                    print_line("copy it to every node of the mesh, and to nobody else")?;
                }
            }
        }
        KeygenCommand::Publisher { out, json } => {
            let secret = keys::new_publisher_secret()?;
            keys::write_secret(&out, &keys::publisher_line(&secret))?;
            match json {
                true => {
                    print_json(&json!({"public": secret.public().to_string(), "secret_file": out}))?;
                }
                false => {
                    print_line(&format!("publisher's secret written to {}: keep it where you publish", out.display()))?;
                    print_line(&format!("nodes trust it with: --trust {}", secret.public()))?;
                }
            }
        }
        KeygenCommand::Public { secret } => {
            print_line(&keys::read_publisher_secret(&secret)?.public().to_string())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
