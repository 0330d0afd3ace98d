/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* All maps. Sizes marked (*) are set by user space before they are created. */
#ifndef BH_MAPS_H
#define BH_MAPS_H

#include "abi.h"

/* links: which slot a link belongs to.
 * key:   ifindex of the host side, host byte order
 * value: slot, host byte order
 * User space adds before it attaches and deletes after it has detached.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 4096); /* (*) */
} links SEC(".maps");

/* slots: the sandboxes.
 * key:   slot, host byte order; slot 0 is never used
 * value: struct bh_slot
 * Only user space writes, field by field through shared memory: ifindex last
 * when a slot is taken and first when it is given up; policy by one store.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_slot);
	__uint(max_entries, 4097); /* (*) */
	__uint(map_flags, BPF_F_MMAPABLE);
} slots SEC(".maps");

/* policies: the policies, and spare empty ones.
 * key:   index, host byte order; 0 stays empty
 * value: a trie; its key is struct bh_lpm_key, its value struct bh_policy_entry
 * A trie is filled before a slot points at it and never changes while one does.
 * Only user space writes. When no slot points at it any more it puts an empty
 * trie over a used one, in the background, and the kernel waits for the programs
 * that may still read it before user space uses the index again.
 */
struct policy_trie {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct bh_lpm_key);
	__type(value, struct bh_policy_entry);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} policy_template SEC(".maps"); /* what user space makes new ones from; stays empty */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(key_size, sizeof(__u32));
	__uint(max_entries, 8193); /* (*) */
	__array(values, struct policy_trie);
} policies SEC(".maps");

/* policy_info: revision and digest of each policy.
 * key:   index into policies
 * value: struct bh_policy_info
 * Only user space reads and writes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_policy_info);
	__uint(max_entries, 8193); /* (*) */
} policy_info SEC(".maps");

/* hard_deny: special-use addresses, host addresses, host networks, sandbox pools.
 * key:   struct bh_lpm_key
 * value: enum bh_reason
 * Only user space writes; when the set changes it adds before it deletes, and
 * deny_filter covers both sets meanwhile.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct bh_lpm_key);
	__type(value, enum bh_reason);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} hard_deny SEC(".maps");

/* deny_filter: spares most packets the walk through hard_deny.
 * key:   0
 * value: struct bh_deny_filter
 * Only user space writes, word by word through shared memory.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_deny_filter);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
} deny_filter SEC(".maps");

/* learned: addresses that names resolved to, under the same index as the policy.
 * key:   index, host byte order; 0 stays empty
 * value: a hash; its key is struct bh_addr, its value struct bh_learned
 * User space adds and deletes addresses while the policy is in force; programs
 * write used alone.
 */
struct learned_hash {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct bh_addr);
	__type(value, struct bh_learned);
	__uint(max_entries, 2048);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} learned_template SEC(".maps"); /* what user space makes new ones from; stays empty */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(key_size, sizeof(__u32));
	__uint(max_entries, 8193); /* (*) */
	__array(values, struct learned_hash);
} learned SEC(".maps");

/* heads: limits and published ports, under the same index as the policy.
 * key:   index, host byte order
 * value: struct bh_head
 * Only user space writes, before a slot points at the index.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_head);
	__uint(max_entries, 8193); /* (*) */
} heads SEC(".maps");

/* rates: token buckets.
 * key:   index, host byte order; 0 is never used
 * value: struct bh_rate
 * Programs move tat; user space writes the rest through shared memory.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_rate);
	__uint(max_entries, 16385); /* (*) */
	__uint(map_flags, BPF_F_MMAPABLE);
} rates SEC(".maps");

/* budgets: byte budgets.
 * key:   index, host byte order; 0 is never used
 * value: struct bh_budget
 * Programs and user space add to left atomically; user space writes the rest
 * through shared memory.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_budget);
	__uint(max_entries, 8193); /* (*) */
	__uint(map_flags, BPF_F_MMAPABLE);
} budgets SEC(".maps");

/* leases: what each CPU has taken out of a budget and not spent.
 * key:   index into budgets
 * value: per-CPU struct bh_lease
 * Only programs write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_lease);
	__uint(max_entries, 8193); /* (*) */
} leases SEC(".maps");

/* echoes: the bucket of each sandbox's ICMP echo requests.
 * key:   slot
 * value: ns of CLOCK_MONOTONIC_COARSE, a virtual clock as in struct bh_rate
 * Only programs write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 4097); /* (*) */
} echoes SEC(".maps");

/* state: what user space tells all programs.
 * key:   0
 * value: struct bh_state
 * Only user space writes, field by field through shared memory.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_state);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
} state SEC(".maps");

/* cached: remembered verdicts, a direct-mapped cache of each CPU.
 * key:   hash of destination, port, protocol and generation
 * value: per-CPU struct bh_cached
 * Only programs read and write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_cached);
	__uint(max_entries, BH_CACHED);
} cached SEC(".maps");

/* inbound: connections from outside to published ports. A lost one comes back
 * with the next packet from outside that the host has marked.
 * key:   struct bh_inbound
 * value: bh_state.tick of the last packet that opened it
 * Only programs write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct bh_inbound);
	__type(value, __u64);
	__uint(max_entries, 65536);
} inbound SEC(".maps");

/* audited: what policies in audit mode let pass. For people, not for bills.
 * key:   struct bh_audit_key
 * value: struct bh_count
 * Programs add; user space reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct bh_audit_key);
	__type(value, struct bh_count);
	__uint(max_entries, 65536);
} audited SEC(".maps");

/* events: the flow log, struct bh_event. A full buffer loses events, never a verdict. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* events_lost: how many events found the buffer full.
 * key:   0
 * value: a count, one for all CPUs
 * Programs add.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} events_lost SEC(".maps");

/* counters: what sandboxes were allowed to send and receive.
 * key:   slot, host byte order
 * value: per-CPU struct bh_counters
 * Programs only add. User space sets to zero only when a slot goes to a new
 * sandbox, before its ifindex is set.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_counters);
	__uint(max_entries, 4097); /* (*) */
} counters SEC(".maps");

/* drops: what sandboxes were not allowed to send and receive, by reason.
 * key:   slot, host byte order; slot 0 counts packets of unknown links
 * value: struct bh_drops, one for all CPUs: a flood of drops may wait for
 *        itself, and a machine with 512 CPUs need not pay for 512 copies
 * Programs only add. User space sets to zero as for counters.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_drops);
	__uint(max_entries, 4097); /* (*) */
} drops SEC(".maps");

/* rule_counters: pages of hit counters, one counter for each rule of each sandbox.
 * key:   page, host byte order
 * value: per-CPU array of BH_RULES_PER_PAGE struct bh_count
 * Programs only add. User space adds pages as they are needed, gives out the
 * counters, and sets one to zero before a policy names it.
 */
struct rule_page {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_count);
	__uint(max_entries, BH_RULES_PER_PAGE);
} rule_page_template SEC(".maps"); /* what user space makes new ones from; stays empty */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(key_size, sizeof(__u32));
	__uint(max_entries, 256);
	__array(values, struct rule_page);
} rule_counters SEC(".maps");

/* rule_names: who owns a hit counter.
 * key:   index of the counter, host byte order
 * value: struct bh_rule_name
 * Only user space reads and writes; it deletes when the sandbox is gone.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct bh_rule_name);
	__uint(max_entries, 131072); /* (*) */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} rule_names SEC(".maps");

/* meta: what the pins beside it are.
 * key:   0
 * value: struct bh_meta
 * Only user space reads and writes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct bh_meta);
	__uint(max_entries, 1);
} meta SEC(".maps");

#endif
