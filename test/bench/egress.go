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

	pathRounds    = 20 // with and without policy in each
	streamStretch = 300 * time.Millisecond
	packetStretch = 150 * time.Millisecond
)

// egress measures the program by itself, as BPF_PROG_TEST_RUN times it over a
// million runs of one packet, less what a program that does nothing takes; and
// traffic over one path with the programs on it and off it.
func egress(rep *report) error {
	if err := programCost(rep); err != nil {
		return err
	}
	return pathCost(rep)
}

func programCost(rep *report) error {
	res, err := goBench(rep.root, "./netpol/enforce", "^BenchmarkProgram(Allow)?$", programRuns, programSamples)
	if err != nil {
		return err
	}
	const unit = "net-ns/op"
	base, err := res.of("ProgramAllow/cidrs=10", unit)
	if err != nil {
		return err
	}
	rep.add(row{Bench: "egress", Name: "program_ns_10_prefixes", Value: base.p50(), Unit: "ns", Better: "lower", spread: base, Limit: 80, LimitOn: "value"})
	for _, n := range []int{1000, 10000} {
		s, err := res.of(fmt.Sprintf("ProgramAllow/cidrs=%d", n), unit)
		if err != nil {
			return err
		}
		rep.add(row{Bench: "egress", Name: fmt.Sprintf("program_ns_%d_prefixes", n), Value: s.p50(), Unit: "ns", Better: "lower", spread: s,
			Ratio: ratio(s.p50(), base.p50()), Against: "10 prefixes"})
	}
	for _, c := range []struct{ bench, name string }{
		{"Program/ingress", "ingress_program_ns"}, {"Program/drop_metadata", "program_ns_hard_deny"},
	} {
		s, err := res.of(c.bench, unit)
		if err != nil {
			return err
		}
		rep.add(row{Bench: "egress", Name: c.name, Value: s.p50(), Unit: "ns", Better: "lower", spread: s})
	}
	return nil
}

// pathCost measures in turns with the programs attached and detached. Its
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
		limit      float64
		run        func(time.Duration) (float64, error)
		stretch    time.Duration
		with, none series
	}{
		{name: "tcp_throughput", unit: "Gbit/s", limit: 0.95, run: p.stream, stretch: streamStretch},
		{name: "tcp_connects", unit: "1/s", run: p.connects, stretch: packetStretch},
		{name: "udp_small_packets", unit: "1/s", run: p.datagrams, stretch: packetStretch},
	}
	for round := range pathRounds + 1 {
		for turn := range 2 {
			with := (round+turn)%2 == 0
			if with {
				err = p.attach()
			} else {
				err = p.detach()
			}
			if err != nil {
				return err
			}
			for i := range kinds {
				k := &kinds[i]
				v, err := k.run(k.stretch)
				if err != nil {
					return fmt.Errorf("%s, policy %t: %w", k.name, with, err)
				}
				switch {
				case round == 0: // warm-up
				case with:
					k.with.add(v)
				default:
					k.none.add(v)
				}
			}
		}
	}
	if err := p.sane(); err != nil {
		return err
	}
	for _, k := range kinds {
		r := row{Bench: "egress", Name: k.name, Value: k.with.p50(), Unit: k.unit, Better: "higher", spread: k.with, peer: k.none,
			Ratio: pairs(k.with, k.none).p50(), Against: "same path without policy"}
		if k.limit != 0 {
			r.Limit, r.LimitOn = k.limit, "ratio"
		}
		rep.add(r)
	}
	return nil
}
