// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

const (
	busybox = "bulkhead.local/busybox:1"

	warmUp       = 4
	launchRounds = 80 // one launch of each contestant in every round
	cliEvery     = 4  // and one by the CLI in every so many
	width        = 8  // launches at once, for the rows that say so
	wideRounds   = 3

	cpuMillis   = 500
	memoryBytes = 64 << 20
	pids        = 64
)

var command = []string{"sleep", "1000"}

// contestant starts a sandbox or container, answering the command's process
// id, and takes it away again.
type contestant interface {
	up(name string) (pid int, err error)
	down(name string) error
}

// ours is a long-lived caller of the agent: its connection stays open.
type ours struct {
	node nodev1.NodeClient
}

func (o ours) up(name string) (int, error) {
	resp, err := o.node.Create(context.Background(), &nodev1.CreateRequest{Spec: &sandboxv1.Spec{
		Name: name, Tenant: "acme", Image: busybox, Command: command,
		Limits: &sandboxv1.Limits{CpuMillis: cpuMillis, MemoryBytes: memoryBytes, Pids: pids},
	}})
	if err != nil {
		return 0, err
	}
	return int(resp.GetSandbox().GetPid()), nil
}

func (o ours) down(name string) error {
	_, err := o.node.Delete(context.Background(), &nodev1.DeleteRequest{Ref: "acme:" + name, Force: true})
	return err
}

// cli is a person at the node.
type cli struct {
	ours
	rig *rig.Rig
}

func (c cli) up(name string) (int, error) {
	out, err := c.rig.CLI("run", "-d", "--name", name, "--tenant", "acme", "--cpus", "0.5", "--memory", "64MiB",
		busybox, command[0], command[1])
	if err != nil {
		return 0, fmt.Errorf("run: %w: %s", err, out)
	}
	resp, err := c.node.Get(context.Background(), &nodev1.GetRequest{Ref: "acme:" + name})
	return int(resp.GetSandbox().GetPid()), err
}

// bare is the plain containerd client with the same limits: no network, no
// policy, no log, no seccomp, nothing on disk but what containerd writes.
type bare struct {
	ctx     context.Context
	client  *client.Client
	image   client.Image
	runtime *runcoptions.Options
	parent  string // cgroup

	mu    sync.Mutex
	tasks map[string]client.Task // +checklocks:mu
}

// bareNamespace is not the agent's: it does not have to look at these events.
const bareNamespace = "bench"

func openBare(r *rig.Rig) (*bare, error) {
	c, err := client.New(r.Containerd.Address)
	if err != nil {
		return nil, err
	}
	b := &bare{
		ctx: namespaces.WithNamespace(context.Background(), bareNamespace), client: c, tasks: map[string]client.Task{},
		runtime: &runcoptions.Options{BinaryName: filepath.Join(r.Bin, "runc"), Root: r.Containerd.RuncRoot},
		parent:  r.Containerd.CgroupParent,
	}
	f, err := os.Open(filepath.Join(r.Repo, "build/images/busybox.tar"))
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	defer f.Close()
	if _, err := c.Import(b.ctx, f); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if b.image, err = c.GetImage(b.ctx, busybox); err == nil {
		err = b.image.Unpack(b.ctx, "overlayfs")
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return b, nil
}

func (b *bare) up(name string) (int, error) {
	c, err := b.client.NewContainer(b.ctx, name,
		client.WithSnapshotter("overlayfs"), client.WithNewSnapshot(name, b.image),
		client.WithRuntime("io.containerd.runc.v2", b.runtime),
		client.WithNewSpec(oci.WithImageConfig(b.image), oci.WithProcessArgs(command...),
			oci.WithMemoryLimit(memoryBytes), oci.WithPidsLimit(pids), oci.WithCPUCFS(cpuMillis*100, 100_000),
			oci.WithCgroup("/"+b.parent+"/"+name)))
	if err != nil {
		return 0, err
	}
	t, err := c.NewTask(b.ctx, cio.NullIO)
	if err != nil {
		return 0, errors.Join(err, c.Delete(b.ctx, client.WithSnapshotCleanup))
	}
	b.mu.Lock()
	b.tasks[name] = t
	b.mu.Unlock()
	return int(t.Pid()), t.Start(b.ctx)
}

func (b *bare) down(name string) error {
	b.mu.Lock()
	t := b.tasks[name]
	delete(b.tasks, name)
	b.mu.Unlock()
	exited, err := t.Wait(b.ctx)
	if err != nil {
		return err
	}
	if err := t.Kill(b.ctx, syscall.SIGKILL); err != nil {
		return err
	}
	<-exited
	if _, err := t.Delete(b.ctx); err != nil {
		return err
	}
	c, err := b.client.LoadContainer(b.ctx, name)
	if err != nil {
		return err
	}
	return c.Delete(b.ctx, client.WithSnapshotCleanup)
}

// measured is what a contestant did.
type measured struct {
	ready    series // ms from the call to the first instruction of the command
	answered series // ms from the call to its answer
	down     series // ms from the call that ends it to its answer
	rate     series // launches a second, several at once
}

// once launches one and takes it away.
func (m *measured) once(ex *execs, c contestant, name string) error {
	ready, answered, err := timeUp(ex, c, name)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := c.down(name); err != nil {
		return fmt.Errorf("take down %s: %w", name, err)
	}
	m.ready.ms(ready)
	m.answered.ms(answered)
	m.down.ms(time.Since(began))
	return nil
}

func timeUp(ex *execs, c contestant, name string) (ready, answered time.Duration, err error) {
	began := monotonic()
	pid, err := c.up(name)
	answered = time.Duration(monotonic() - began)
	if err == nil {
		ready, err = ex.since(began, pid)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("launch %s: %w", name, err)
	}
	return ready, answered, nil
}

// wide launches several at once.
func (m *measured) wide(ex *execs, c contestant, prefix string) error {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	all := func(do func(name string) error) {
		for i := range width {
			wg.Go(func() {
				if err := do(fmt.Sprintf("%s-%d", prefix, i)); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
	}
	began := time.Now()
	all(func(name string) error {
		ready, _, err := timeUp(ex, c, name)
		mu.Lock()
		m.ready.ms(ready)
		mu.Unlock()
		return err
	})
	m.rate.add(width / time.Since(began).Seconds())
	began = time.Now()
	all(c.down)
	m.down.ms(time.Since(began) / width)
	return errors.Join(errs...)
}

func launch(rep *report) error {
	return rep.withNode(func(r *rig.Rig, node nodev1.NodeClient) (err error) {
		ex, err := openExecs()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, ex.close()) }()
		b, err := openBare(r)
		if err != nil {
			return fmt.Errorf("bare containerd: %w", err)
		}
		defer func() { err = errors.Join(err, b.client.Close()) }()
		o := ours{node}
		return measureLaunch(rep, ex, o, cli{o, r}, b)
	})
}

func measureLaunch(rep *report, ex *execs, o, person, b contestant) error {
	type entry struct {
		name string
		c    contestant
		m    measured
	}
	mine, theirs, persons := &entry{name: "ours", c: o}, &entry{name: "bare", c: b}, &entry{name: "cli", c: person}
	for round := range warmUp + launchRounds {
		order := []*entry{mine, theirs}
		if round%2 == 1 { // so that each suffers as often from what the other leaves behind as from its own
			order = []*entry{theirs, mine}
		}
		if round%cliEvery == cliEvery-1 {
			order = append(order, persons)
		}
		for _, e := range order {
			m := &e.m
			if round < warmUp {
				m = &measured{}
			}
			if err := m.once(ex, e.c, fmt.Sprintf("%s-%d", e.name, round)); err != nil {
				return err
			}
		}
	}
	r := versus("cold_ready_p50", "ms", "lower", mine.m.ready, theirs.m.ready)
	r.Limit, r.LimitOn = 1.25, "ratio"
	rep.add(r)
	p90 := mine.m.ready.percentile(90)
	rep.add(row{Bench: "launch", Name: "cold_ready_p90", Value: p90, Unit: "ms", Better: "lower", Ratio: ratio(p90, theirs.m.ready.percentile(90)), Against: againstBare})
	rep.add(versus("cold_answer_p50", "ms", "lower", mine.m.answered, theirs.m.answered))
	person50 := persons.m.ready.p50()
	rep.add(row{Bench: "launch", Name: "cli_run_detached_p50", Value: person50, Unit: "ms", Better: "lower", spread: persons.m.ready,
		Ratio: ratio(person50, theirs.m.ready.p50()), Against: againstBare})
	rep.add(versus("teardown_p50", "ms", "lower", mine.m.down, theirs.m.down))

	var wideMine, wideTheirs measured
	for round := range wideRounds {
		for i := range 2 {
			e, m := mine, &wideMine
			if (i+round)%2 == 1 {
				e, m = theirs, &wideTheirs
			}
			if err := m.wide(ex, e.c, fmt.Sprintf("%s-w%d", e.name, round)); err != nil {
				return err
			}
		}
	}
	at := fmt.Sprintf("_c%d", width)
	rep.add(versus("ready_p50"+at, "ms", "lower", wideMine.ready, wideTheirs.ready))
	rep.add(versus("rate"+at, "1/s", "higher", wideMine.rate, wideTheirs.rate))
	rep.add(versus("teardown_each"+at, "ms", "lower", wideMine.down, wideTheirs.down))
	return nil
}

const againstBare = "bare containerd client, same run"

// versus is a row of the launch group. Its ratio is the median of the rounds'
// own ratios: other work on the machine slows both of a round, and whole rounds
// more than others.
func versus(name, unit, better string, mine, theirs series) row {
	return row{Bench: "launch", Name: name, Value: mine.p50(), Unit: unit, Better: better, spread: mine,
		Ratio: pairs(mine, theirs).p50(), Against: againstBare, peer: theirs}
}
