// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

const (
	policyChanges = 1000                   // of one sandbox, one after the other
	policyFlips   = 200                    // between allow and deny, with traffic
	changePause   = 2 * time.Millisecond   // between changes; nobody makes more
	reloadPause   = 500 * time.Millisecond // an operator who is in a hurry

	changeLimit     = 5.0  // ms, p99
	changeManyLimit = 50.0 // ms, for manySandboxes
	manySandboxes   = 100
	reloadRounds    = 40
)

// stamps is what the receiver of a stream of stamped datagrams knows: the time
// at which the latest of them was about to be sent, since the path's start.
type stamps struct {
	latest atomic.Int64
	first  atomic.Int64 // the first one since it was set to zero
}

// stampsFlow sends datagrams with their time of sending, some ten thousand a
// second so that neither CPU is its own, until done is closed.
func (p *path) stampsFlow(began time.Time, s *stamps, done <-chan struct{}) error {
	over := func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	}
	receive := func(l int) error {
		tv := unix.NsecToTimeval(acceptWait.Nanoseconds())
		if err := unix.SetsockoptTimeval(l, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		buf := make([]byte, 64)
		for {
			n, err := unix.Read(l, buf)
			switch {
			case err == nil && n >= 8:
				t := int64(binary.LittleEndian.Uint64(buf))
				s.latest.Store(max(t, s.latest.Load())) // one writer
				s.first.CompareAndSwap(0, t)
			case errors.Is(err, unix.EAGAIN):
				if over() {
					return nil
				}
			case err != nil && !errors.Is(err, unix.EINTR):
				return err
			}
		}
	}
	return p.duplex(unix.SOCK_DGRAM, datagramPort, receive, func() error {
		return dial(unix.SOCK_DGRAM, datagramPort, func(fd int) error {
			buf := make([]byte, datagramSize)
			for i := 0; !over(); i++ {
				if i%4 == 0 {
					time.Sleep(100 * time.Microsecond)
				}
				binary.LittleEndian.PutUint64(buf, uint64(time.Since(began)))
				if err := again(func() error { _, err := unix.Write(fd, buf); return err }); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// changeCost measures how long a change of policy takes while the sandbox
// sends, and proves that it is in force when it returns: of the packets sent
// after a deny not one arrives.
func changeCost(rep *report) (err error) {
	p, err := openPath()
	if err != nil {
		return err
	}
	closing := rep.atEnd(p.close)
	defer func() { err = errors.Join(err, closing()) }()
	allow, err := compilePolicy(pathPolicy)
	if err != nil {
		return err
	}
	wider, err := compilePolicy(strings.Replace(pathPolicy, "443/tcp", "443/tcp, 8443/tcp", 1))
	if err != nil {
		return err
	}
	deny, err := compilePolicy(strings.Replace(pathPolicy, "5000-5010/tcp, 5000-5010/udp", "443/tcp", 1))
	if err != nil {
		return err
	}
	p.denies = true
	if err := p.attach(); err != nil {
		return err
	}
	rev := uint64(1)
	change := func(prog netpol.Program) (time.Duration, error) {
		rev++
		began := time.Now()
		err := p.enforcer.SetPolicy(p.sandbox.ID, p.sandbox.Slot, prog, rev, nil)
		return time.Since(began), err
	}
	began := time.Now()
	var s stamps
	done := make(chan struct{})
	var flow errgroup.Group
	flow.Go(func() error { return p.stampsFlow(began, &s, done) })
	err = func() error {
		defer close(done)
		var took, first series
		for i := range policyChanges {
			d, err := change([]netpol.Program{wider, allow}[i%2])
			if err != nil {
				return err
			}
			took.ms(d)
			time.Sleep(changePause)
		}
		for range policyFlips {
			if _, err := change(deny); err != nil {
				return err
			}
			denied := time.Since(began)
			time.Sleep(changePause)
			if late := time.Duration(s.latest.Load()) - denied; late > 0 {
				return fmt.Errorf("a packet that was sent %s after a deny had returned has arrived", late)
			}
			s.first.Store(0)
			called := time.Since(began)
			if _, err := change(allow); err != nil {
				return err
			}
			for wait := time.Now(); s.first.Load() == 0; time.Sleep(50 * time.Microsecond) {
				if time.Since(wait) > time.Second {
					return errors.New("no packet arrives a second after an allow has returned")
				}
			}
			first.ms(time.Duration(s.first.Load()) - called)
		}
		rep.add(row{Bench: "egress", Name: "policy_change_ms", Value: took.p50(), Unit: "ms", Better: "lower", spread: took})
		rep.add(row{Bench: "egress", Name: "policy_change_ms_p99", Value: took.percentile(99), Unit: "ms", Better: "lower", Limit: changeLimit, LimitOn: "value"})
		rep.add(row{Bench: "egress", Name: "change_to_first_packet_ms", Value: first.p50(), Unit: "ms", Better: "lower", spread: first})
		return nil
	}()
	return errors.Join(err, flow.Wait())
}

// reloadCost measures what an operator waits for: the tenant's file read again,
// the policies of all its sandboxes changed, on disk and in the kernel.
func reloadCost(rep *report) error {
	return rep.withNode(func(r *rig.Rig, node nodev1.NodeClient) error {
		ctx := context.Background()
		running := 0
		for _, c := range []struct {
			name      string
			sandboxes int
			p         int
			limit     float64
		}{
			{"reload_1_sandbox_ms", 1, 50, 0},
			{"reload_100_sandboxes_ms", manySandboxes, 50, changeManyLimit},
		} {
			var g errgroup.Group
			g.SetLimit(width)
			for ; running < c.sandboxes; running++ {
				name := fmt.Sprintf("many-%d", running)
				g.Go(func() error {
					_, err := node.Create(ctx, &nodev1.CreateRequest{Spec: &sandboxv1.Spec{
						Name: name, Tenant: "acme", Image: busybox, Command: command,
						Limits: &sandboxv1.Limits{CpuMillis: 20, MemoryBytes: 8 << 20, Pids: 16},
					}})
					return err
				})
			}
			if err := g.Wait(); err != nil {
				return err
			}
			time.Sleep(settle)
			var took series
			for i := range reloadRounds {
				text := tenantFile
				if i%2 == 0 {
					text = strings.Replace(text, "443/tcp, 5000/tcp", "443/tcp, 5001/tcp", 1)
				}
				if err := os.WriteFile(filepath.Join(r.TenantsDir, "acme.yaml"), []byte(text), 0o600); err != nil {
					return err
				}
				began := time.Now()
				resp, err := node.Reload(ctx, &nodev1.ReloadRequest{})
				if err != nil {
					return err
				}
				took.ms(time.Since(began))
				time.Sleep(reloadPause)
				if int(resp.GetSandboxesUpdated()) != c.sandboxes {
					return fmt.Errorf("a reload changed %d policies of %d", resp.GetSandboxesUpdated(), c.sandboxes)
				}
			}
			rep.add(row{Bench: "egress", Name: c.name, Value: took.percentile(c.p), Unit: "ms", Better: "lower", spread: took, Limit: c.limit, LimitOn: "value"})
		}
		return nil
	})
}
