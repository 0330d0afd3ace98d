// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol/enforce"
)

const (
	floodRounds  = 15
	floodStretch = 400 * time.Millisecond
	floodDenied  = 6000 // a port that no rule allows
	floodRate    = 60   // datagrams a millisecond, half of what one CPU can send where they pass
)

// flood sends small datagrams to a port at a fixed rate until over says so, and
// answers how many there were.
func (p *path) flood(port int, over *atomic.Bool) (sent int, err error) {
	err = p.end(p.box, 0, func() error {
		return dial(unix.SOCK_DGRAM, port, func(fd int) error {
			buf := make([]byte, datagramSize)
			for began := time.Now(); !over.Load(); sent++ {
				for sent > floodRate*int(time.Since(began).Milliseconds()) && !over.Load() {
					time.Sleep(200 * time.Microsecond)
				}
				if err := again(func() error { _, err := unix.Write(fd, buf); return err }); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
					return err
				}
			}
			return nil
		})
	})
	return sent, err
}

// floodCost measures what a neighbour gets done while a sandbox floods: with
// packets that are allowed, with as many as it can send that are denied, and
// with denied ones while somebody reads the flow log.
func floodCost(rep *report) (err error) {
	p, err := openPath()
	if err != nil {
		return err
	}
	closing := rep.atEnd(p.close)
	defer func() { err = errors.Join(err, closing()) }()
	p.denies = true
	if err := p.attach(); err != nil {
		return err
	}
	ctx := context.Background()
	if err := within(p.host, func() error { return p.enforcer.Attach(ctx, p.neighbour) }); err != nil {
		return err
	}
	second := *p // the neighbour's end of the same path
	second.box = p.second
	kinds := []struct {
		port     int // 0: nobody floods
		log      bool
		trips    series
		sent     series // datagrams a second
		reported atomic.Int64
	}{{}, {port: datagramPort}, {port: floodDenied}, {port: floodDenied, log: true}}
	for round := range floodRounds + 1 {
		for turn := range kinds {
			k := &kinds[(round+turn)%len(kinds)]
			var over atomic.Bool
			var g errgroup.Group
			sent := 0
			if k.port != 0 {
				g.Go(func() (err error) { sent, err = p.flood(k.port, &over); return err })
			}
			reading, stop := context.WithCancel(ctx)
			if k.log {
				g.Go(func() error {
					err := p.enforcer.Events(reading, func(enforce.Event) { k.reported.Add(1) })
					if errors.Is(err, context.Canceled) {
						err = nil
					}
					return err
				})
			}
			v, err := second.roundTrips(floodStretch)
			over.Store(true)
			stop()
			if err := errors.Join(err, g.Wait()); err != nil {
				return fmt.Errorf("flood at port %d: %w", k.port, err)
			}
			if round > 0 {
				k.trips.add(v)
				k.sent.add(float64(sent) / floodStretch.Seconds())
			}
		}
	}
	quiet, allowed, denied, logged := &kinds[0], &kinds[1], &kinds[2], &kinds[3]
	if logged.reported.Load() == 0 {
		return errors.New("the flow log has nothing of the flood")
	}
	rep.add(row{Bench: "egress", Name: "neighbour_trips_denied_flood", Value: denied.trips.p50(), Unit: "1/s", Better: "higher", spread: denied.trips,
		peer: allowed.trips, Ratio: pairs(denied.trips, allowed.trips).p50(), Against: "the same flood allowed", Limit: 1, LimitOn: "ratio"})
	rep.add(row{Bench: "egress", Name: "neighbour_trips_allowed_flood", Value: allowed.trips.p50(), Unit: "1/s", Better: "higher", spread: allowed.trips,
		peer: quiet.trips, Ratio: pairs(allowed.trips, quiet.trips).p50(), Against: "no flood"})
	rep.add(row{Bench: "egress", Name: "neighbour_trips_flood_logged", Value: logged.trips.p50(), Unit: "1/s", Better: "higher", spread: logged.trips,
		peer: denied.trips, Ratio: pairs(logged.trips, denied.trips).p50(), Against: "nobody reads the flow log"})
	rep.add(row{Bench: "egress", Name: "flood_denied_datagrams", Value: denied.sent.p50(), Unit: "1/s", Better: "higher", spread: denied.sent,
		peer: allowed.sent, Ratio: pairs(denied.sent, allowed.sent).p50(), Against: "the same flood allowed"})
	rep.add(row{Bench: "egress", Name: "flood_events_logged", Value: float64(logged.reported.Load()) / floodRounds, Unit: "1/round", Better: "lower"})
	return p.enforcer.Detach(p.neighbour.ID, p.neighbour.Slot)
}
