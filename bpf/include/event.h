/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The flow log: the first packet of a counter in each tick. What happens here
 * never changes a verdict.
 */
#ifndef BH_EVENT_H
#define BH_EVENT_H

#include "maps.h"
#include "parse.h"

/*
 * Sends e, which says what happened to packet p; the rest is filled in here. c is
 * the counter that it was added to. Out of line: at most once a tick and counter.
 */
static __noinline int emit(struct bh_event *e, const struct bh_packet *p, const struct bh_count *c)
{
	__u32 zero = 0;
	__u64 *lost;

	e->packets = c->packets;
	e->bytes = c->bytes;
	e->len = p->bytes;
	e->sport = p->sport;
	e->dport = p->port;
	e->proto = p->proto;
	e->addr = *(const struct bh_addr *)&p->other.family;
	if (!bpf_ringbuf_output(&events, e, sizeof(*e), 0))
		return 0;
	lost = bpf_map_lookup_elem(&events_lost, &zero);
	if (lost)
		__sync_fetch_and_add(lost, 1);
	return 0;
}

/* Whether a counter has not been spoken of in this tick; from now on it has. */
static __always_inline int is_news(struct bh_count *c, const struct bh_state *st)
{
	__u64 tick = st->tick;

	if (!tick || c->tick == tick)
		return 0;
	c->tick = tick;
	return 1;
}

#endif
