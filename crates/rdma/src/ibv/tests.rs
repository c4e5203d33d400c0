//! The layouts and numbers of this file, compared with those of the real headers.

use super::*;
use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::process::Command;

/// One thing to ask the headers: how to say it in C, and what is here.
type Claim = (String, i64);

macro_rules! claims {
    ($claims:ident; $($name:ident $(($size:expr))? { $($field:ident $(= $c:expr)?),* $(,)? })*) => { $(
        $( $claims.push(($size.to_string(), size_of::<$name>() as i64)); )?
        $( {
            let member = [stringify!($field) $(, $c)?].last().copied().unwrap_or_default();
            let c = format!("offsetof(struct {}, {member})", stringify!($name));
            $claims.push((c, i64::try_from(offset_of!($name, $field)).expect("small")));
        } )*
    )* };
}

/// Structures that this crate allocates are compared whole, others up to the last member read.
fn layouts() -> Vec<Claim> {
    let mut claims: Vec<Claim> = Vec::new();
    claims! { claims;
        ibv_context { device, ops, cmd_fd, async_fd, num_comp_vectors }
        ibv_context_ops ("sizeof(struct ibv_context_ops)") { alloc_mw, dealloc_mw, poll_cq, req_notify_cq, post_send }
        ibv_pd { context, handle }
        ibv_mr { context, pd, addr, length, handle, lkey, rkey }
        ibv_mw { context, pd, rkey, handle, mw_type = "type" }
        ibv_comp_channel { context, fd }
        ibv_cq { context }
        ibv_qp { context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num }
        ibv_qp_cap ("sizeof(struct ibv_qp_cap)") { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data }
        ibv_qp_init_attr ("sizeof(struct ibv_qp_init_attr)") { qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
        ibv_global_route ("sizeof(struct ibv_global_route)") { dgid, flow_label, sgid_index, hop_limit, traffic_class }
        ibv_ah_attr ("sizeof(struct ibv_ah_attr)") { grh, dlid, sl, src_path_bits, static_rate, is_global, port_num }
        ibv_qp_attr ("sizeof(struct ibv_qp_attr)") {
            qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap,
            ah_attr, alt_ah_attr, pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining, max_rd_atomic,
            max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout,
            rate_limit,
        }
        ibv_sge ("sizeof(struct ibv_sge)") { addr, length, lkey }
        ibv_send_wr ("sizeof(struct ibv_send_wr)") {
            wr_id, next, sg_list, num_sge, opcode, send_flags, invalidate_rkey, wr, bind_mw,
            xrc_remote_srqn = "qp_type.xrc.remote_srqn",
        }
        ibv_wc ("sizeof(struct ibv_wc)") {
            wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp, wc_flags, pkey_index, slid, sl,
            dlid_path_bits,
        }
        ibv_port_attr {
            state, max_mtu, active_mtu, gid_tbl_len, port_cap_flags, max_msg_sz, pkey_tbl_len, lid, sm_lid, lmc,
            active_width, active_speed, phys_state, link_layer, flags, port_cap_flags2,
        }
        ibv_device_attr ("sizeof(struct ibv_device_attr)") {
            fw_ver, node_guid, max_mr_size, vendor_id, hw_ver, max_qp, max_qp_wr, device_cap_flags, max_sge, max_cq,
            max_cqe, max_mr, max_pd, max_qp_rd_atom, max_qp_init_rd_atom, max_mw, max_srq_sge, max_pkeys,
            local_ca_ack_delay, phys_port_cnt,
        }
        ibv_gid_entry ("sizeof(struct ibv_gid_entry)") { gid, gid_index, port_num, gid_type, ndev_ifindex }
    }
    let size = |c: &str, size: usize| (c.to_string(), size as i64);
    claims.push(size("sizeof(union ibv_gid)", size_of::<ibv_gid>()));
    let of_union = offset_of!(ibv_send_wr, wr);
    claims.push(size("offsetof(struct ibv_send_wr, wr.rdma.remote_addr)", of_union + offset_of!(wr_rdma, remote_addr)));
    claims.push(size("offsetof(struct ibv_send_wr, wr.rdma.rkey)", of_union + offset_of!(wr_rdma, rkey)));
    let of_bind = offset_of!(ibv_send_wr, bind_mw);
    for (member, offset) in [
        ("mw", offset_of!(wr_bind_mw, mw)),
        ("rkey", offset_of!(wr_bind_mw, rkey)),
        ("bind_info.mr", offset_of!(wr_bind_mw, mr)),
        ("bind_info.addr", offset_of!(wr_bind_mw, addr)),
        ("bind_info.length", offset_of!(wr_bind_mw, length)),
        ("bind_info.mw_access_flags", offset_of!(wr_bind_mw, mw_access_flags)),
    ] {
        claims.push(size(&format!("offsetof(struct ibv_send_wr, bind_mw.{member})"), of_bind + offset));
    }
    // What the symbol `ibv_query_port` writes must fit: newer headers have longer structures, which
    // only newer calls fill.
    let port = size_of::<ibv_port_attr>();
    claims.push((format!("offsetof(struct ibv_port_attr, port_cap_flags2) + 2 <= {port}"), 1));
    claims
}

#[test]
fn every_layout_and_number_is_that_of_the_headers() {
    let mut claims = layouts();
    // Numbers that the headers do not name in C: kinds of GIDs are an enumeration of verbs.h as the others.
    claims.extend(CONSTANTS.iter().map(|(name, value)| ((*name).to_string(), *value)));
    let mut program =
        String::from("#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\nint main(void) {\n");
    for (c, _) in &claims {
        writeln!(program, "  printf(\"%lld\\n\", (long long)({c}));").expect("a string takes any text");
    }
    program.push_str("  return 0;\n}\n");

    let dir = tempfile::tempdir().expect("a temporary directory");
    let (source, binary) = (dir.path().join("abi.c"), dir.path().join("abi"));
    std::fs::write(&source, program).expect("room for a short file");
    let compiled = Command::new("cc").arg("-o").arg(&binary).arg(&source).output().expect("cc runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let said = Command::new(&binary).output().expect("it runs").stdout;
    let said: Vec<i64> = String::from_utf8_lossy(&said).lines().map(|l| l.parse().expect("a number")).collect();
    assert_eq!(said.len(), claims.len());
    let wrong: Vec<String> = (claims.iter().zip(&said))
        .filter(|((_, here), there)| here != *there)
        .map(|((c, here), there)| format!("{c} is {there} there, {here} here"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
