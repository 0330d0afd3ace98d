// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"time"
)

const (
	programRuns    = "1000000x"
	programSamples = 9

	pathRounds    = 20 // every contestant in each
	streamStretch = 300 * time.Millisecond
	packetStretch = 150 * time.Millisecond
)

// egress measures the program by itself, as BPF_PROG_TEST_RUN times it over a
// million runs of one packet, less what a program that does nothing takes;
// traffic over one path without policy, with ours and with nftables; how fast a
// change of policy is in force; what the resolver adds to its upstream's answer;
// and what a flood of one sandbox costs another.
func egress(rep *report) error {
	for _, part := range []func(*report) error{programCost, pathCost, changeCost, resolverCost, floodCost, reloadCost} {
		if err := part(rep); err != nil {
			return err
		}
	}
	return nil
}

// programRows are the rows that come out of the benchmarks of netpol/enforce.
var programRows = []struct {
	bench, name string
	limit       float64 // of the value, in ns
	base        string  // another bench, for a ratio
	ratio       float64 // its limit
}{
	{bench: "ProgramAllow/cidrs=10", name: "program_ns_10_prefixes", limit: 60},
	{bench: "ProgramAllow/cidrs=1000", name: "program_ns_1000_prefixes", base: "ProgramAllow/cidrs=10"},
	{bench: "ProgramAllow/cidrs=10000", name: "program_ns_10000_prefixes", base: "ProgramAllow/cidrs=10", ratio: 2},
	{bench: "ProgramAllow/cidrs=100000", name: "program_ns_100000_prefixes", base: "ProgramAllow/cidrs=10"},
	{bench: "ProgramRandom/cidrs=10", name: "program_ns_10_prefixes_random"},
	{bench: "ProgramRandom/cidrs=1000", name: "program_ns_1000_prefixes_random", base: "ProgramRandom/cidrs=10"},
	{bench: "ProgramRandom/cidrs=10000", name: "program_ns_10000_prefixes_random", base: "ProgramRandom/cidrs=10"},
	{bench: "ProgramRandom/cidrs=100000", name: "program_ns_100000_prefixes_random", base: "ProgramRandom/cidrs=10"},
	{bench: "ProgramLimits/two_rates,_budget", name: "program_ns_rates_and_budget", limit: 100},
	{bench: "Program/drop_metadata", name: "program_ns_hard_deny"},
	{bench: "Program/no_rule", name: "program_ns_no_rule"},
	{bench: "Program/ingress", name: "ingress_program_ns"},
}

func programCost(rep *report) error {
	res, err := goBench(rep.root, "./netpol/enforce", "^BenchmarkProgram(Allow|Random|Limits)?$", programRuns, programSamples)
	if err != nil {
		return err
	}
	const unit = "net-ns/op"
	for _, c := range programRows {
		s, err := res.of(c.bench, unit)
		if err != nil {
			return err
		}
		r := row{Bench: "egress", Name: c.name, Value: s.p50(), Unit: "ns", Better: "lower", spread: s}
		if c.base != "" {
			base, err := res.of(c.base, unit)
			if err != nil {
				return err
			}
			r.Ratio, r.Against = ratio(s.p50(), base.p50()), "10 prefixes"
		}
		switch {
		case c.limit != 0:
			r.Limit, r.LimitOn = c.limit, "value"
		case c.ratio != 0:
			r.Limit, r.LimitOn = c.ratio, "ratio"
		}
		rep.add(r)
	}
	return nil
}

// resolverCost is what the resolver adds to an upstream on the loopback device,
// asked in turn. The kernel's table is not behind it: that adds some 10 us to the
// first answer with an address.
func resolverCost(rep *report) error {
	res, err := goBench(rep.root, "./netpol/dns", "^BenchmarkAddedLatency$", "3000x", 5)
	if err != nil {
		return err
	}
	s, err := res.of("AddedLatency", "added-p50-us")
	if err != nil {
		return err
	}
	rep.add(row{Bench: "egress", Name: "resolver_added_us", Value: s.p50(), Unit: "us", Better: "lower", spread: s, Limit: 1000, LimitOn: "value"})
	return nil
}

// mode is what judges the packets of a path.
type mode int

const (
	unjudged mode = iota
	enforced
	rivalled
)

// pathCost measures in turns without policy, with ours and with nftables. Its
// ratios are medians of the rounds' own ratios: the load of a machine that does
// other work changes from round to round, and hardly within one.
func pathCost(rep *report) (err error) {
	p, err := openPath()
	if err != nil {
		return err
	}
	closing := rep.atEnd(p.close)
	defer func() { err = errors.Join(err, closing()) }()
	kinds := []struct {
		name, unit string
		limit      float64 // against no policy
		rival      float64 // against nftables
		run        func(time.Duration) (float64, error)
		stretch    time.Duration
		got        [3]series
	}{
		{name: "tcp_throughput", unit: "Gbit/s", limit: 0.97, rival: 1, run: p.stream, stretch: streamStretch},
		{name: "tcp_connects", unit: "1/s", limit: 0.95, rival: 1, run: p.connects, stretch: packetStretch},
		{name: "tcp_round_trips", unit: "1/s", run: p.roundTrips, stretch: packetStretch},
		{name: "udp_small_packets", unit: "1/s", run: p.datagrams, stretch: packetStretch},
	}
	for round := range pathRounds + 1 {
		for turn := range 3 {
			m := mode((round + turn) % 3)
			if err := p.set(m); err != nil {
				return err
			}
			for i := range kinds {
				k := &kinds[i]
				v, err := k.run(k.stretch)
				if err != nil {
					return fmt.Errorf("%s, mode %d: %w", k.name, m, err)
				}
				if round > 0 { // the first is to warm up
					k.got[m].add(v)
				}
			}
		}
	}
	if err := p.sane(); err != nil {
		return err
	}
	for _, k := range kinds {
		for _, peer := range []struct {
			suffix, against string
			mode            mode
			limit           float64
		}{
			{"", "same path without policy", unjudged, k.limit},
			{"_nft", "nftables sets with the same rules", rivalled, k.rival},
		} {
			r := row{Bench: "egress", Name: k.name + peer.suffix, Value: k.got[enforced].p50(), Unit: k.unit, Better: "higher",
				spread: k.got[enforced], peer: k.got[peer.mode],
				Ratio: pairs(k.got[enforced], k.got[peer.mode]).p50(), Against: peer.against}
			if peer.limit != 0 {
				r.Limit, r.LimitOn = peer.limit, "ratio"
			}
			rep.add(r)
		}
	}
	return nil
}
