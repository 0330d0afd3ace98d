// SPDX-License-Identifier: Apache-2.0

package bpf

// The object serves every little-endian machine: the programs touch nothing
// that differs between them. asm/types.h is the C library's own, wherever the
// distribution keeps it; other machines than these two find it without help.

//go:generate go tool bpf2go -go-package bpf -target bpfel -cc clang -type bh_reason -type bh_slot -type bh_lpm_key -type bh_port_rule -type bh_policy_entry -type bh_policy_info -type bh_counters -type bh_count -type bh_drops -type bh_rule_name -type bh_deny_filter -type bh_meta -type bh_step -type bh_addr -type bh_learned -type bh_published -type bh_head -type bh_rate -type bh_budget -type bh_lease -type bh_state -type bh_cached -type bh_inbound -type bh_audit_key -type bh_event Datapath datapath.bpf.c -- -I include -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu -O2 -g -Wall -Werror -mcpu=v3
