// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

const (
	idleSandboxes = 50
	idleFor       = 21 * time.Second // two usage intervals and a bit
	settle        = 3 * time.Second

	clockTick = 100 // USER_HZ, the same on every Linux that Go runs on
)

// agent measures the agent with idle sandboxes: their commands sleep, it
// samples usage every 10 s as by default, verifies enforcement every 2 s (five
// times as often as by default), and reports to a gateway.
func agent(rep *report) error {
	return rep.withNode(func(r *rig.Rig, node nodev1.NodeClient) error { return measureAgent(rep, r, node) })
}

func measureAgent(rep *report, r *rig.Rig, node nodev1.NodeClient) error {
	pid := r.AgentPID()
	empty, err := readMemory(pid)
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(width)
	for i := range idleSandboxes {
		g.Go(func() error {
			_, err := node.Create(context.Background(), &nodev1.CreateRequest{Spec: &sandboxv1.Spec{
				Name: fmt.Sprintf("idle-%d", i), Tenant: "acme", Image: busybox, Command: command,
				Limits: &sandboxv1.Limits{CpuMillis: 20, MemoryBytes: 8 << 20, Pids: 16},
			}})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	time.Sleep(settle)
	before, err := cpuTicks(pid)
	if err != nil {
		return err
	}
	began := time.Now()
	time.Sleep(idleFor)
	after, err := cpuTicks(pid)
	if err != nil {
		return err
	}
	percent := float64(after-before) / clockTick / time.Since(began).Seconds() * 100
	full, err := readMemory(pid)
	if err != nil {
		return err
	}
	rep.add(row{Bench: "agent", Name: fmt.Sprintf("rss_%d_sandboxes", idleSandboxes), Value: full.rss, Unit: "MiB", Better: "lower", Limit: 60, LimitOn: "value"})
	rep.add(row{Bench: "agent", Name: "rss_empty", Value: empty.rss, Unit: "MiB", Better: "lower"})
	rep.add(row{Bench: "agent", Name: "rss_per_sandbox", Value: (full.rss - empty.rss) / idleSandboxes * 1024, Unit: "KiB", Better: "lower"})
	rep.add(row{Bench: "agent", Name: fmt.Sprintf("idle_cpu_%d_sandboxes", idleSandboxes), Value: percent, Unit: "% of a core", Better: "lower", Limit: 1, LimitOn: "value"})
	return others(rep, r)
}

// others adds what else is there for every sandbox.
func others(rep *report, r *rig.Rig) error {
	for _, o := range []struct{ name, program, below string }{
		{"pss_logger_per_sandbox", "bulkhead-log", r.Dir},
		{"pss_shim_per_sandbox", "containerd-shim-runc-v2", r.Containerd.Dir},
	} {
		pids, err := processes(o.program, o.below)
		if err != nil {
			return err
		}
		if len(pids) != idleSandboxes {
			return fmt.Errorf("%d processes of %s, want %d", len(pids), o.program, idleSandboxes)
		}
		var s series
		for _, pid := range pids {
			m, err := readMemory(pid)
			if err != nil {
				return err
			}
			s.add(m.pss)
		}
		rep.add(row{Bench: "agent", Name: o.name, Value: s.p50(), Unit: "MiB", Better: "lower", spread: s})
	}
	return nil
}

// processes answers those of a program that were told of a directory.
func processes(program, below string) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, f := range files {
		cmdline, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		// A logger's directory travels in a URI, escaped, and arrives plain.
		name, _, _ := strings.Cut(string(cmdline), "\x00")
		if filepath.Base(name) != program || !strings.Contains(string(cmdline), below) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// memory of a process, in MiB.
type memory struct {
	rss float64
	pss float64 // pages that are shared count in part
}

func readMemory(pid int) (memory, error) {
	var m memory
	path := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	text, err := os.ReadFile(path)
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			return m, fmt.Errorf("read %s: %w", path, err)
		}
		switch f[0] {
		case "Rss:":
			m.rss = kib / 1024
		case "Pss:":
			m.pss = kib / 1024
		}
	}
	if m.rss == 0 {
		return m, fmt.Errorf("read %s: no Rss", path)
	}
	return m, nil
}

// cpuTicks answers utime and stime of a process and all its threads.
func cpuTicks(pid int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything.
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("read %s: too short", path)
	}
	user, err1 := strconv.ParseUint(f[11], 10, 64)
	system, err2 := strconv.ParseUint(f[12], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	return user + system, nil
}
