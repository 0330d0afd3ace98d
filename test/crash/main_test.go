// SPDX-License-Identifier: Apache-2.0

// Package crash kills the daemons with KILL, everywhere, and holds what is left
// against what was promised: sandboxes run on or end cleanly, nothing stays on
// the machine, every byte is billed once.
//
// The agent that is killed at a named point is this test's own program: it
// starts itself again with BULKHEAD_CRASH in its environment, and is then
// nothing but bulkhead-agent with a fault.
package crash

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent"
	"github.com/bulkheadhq/bulkhead/agent/config"
	"github.com/bulkheadhq/bulkhead/test/containerdtest"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

// The images: python of most sandboxes here, busybox of those that must start
// at once.
const (
	python  = "bulkhead.local/python:3"
	busybox = "bulkhead.local/busybox:1"
)

// crashEnv makes this program an agent. Its value is the point at which it
// kills itself and the how manieth time, as in start:recorded/1, or the path of
// a file into which it writes every point.
const crashEnv = "BULKHEAD_CRASH"

// shared is the rig of all tests; nil until the first needs it.
var shared *rig.Rig

func TestMain(m *testing.M) {
	if where := os.Getenv(crashEnv); where != "" {
		os.Exit(runAgent(where))
	}
	code := m.Run()
	if shared != nil {
		err := shared.Close()
		left, lerr := rig.Leftovers()
		if err = errors.Join(err, lerr); err != nil || len(left) > 0 {
			fmt.Fprintf(os.Stderr, "after all tests: %v, left behind: %q\n", err, left)
			code = 1
		}
	}
	os.Exit(code)
}

// runAgent is bulkhead-agent with a fault.
func runAgent(where string) int {
	flags := flag.NewFlagSet("crash", flag.ExitOnError)
	file := flags.String("config", "", "configuration `file`")
	_ = flags.Parse(os.Args[1:])
	cfg, err := config.Load(*file)
	if err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err = agent.Run(ctx, agent.Options{Config: cfg, Version: "crash", Log: slog.New(cfg.LogHandler(os.Stderr)), Fault: fault(where)})
	if err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		return 1
	}
	return 0
}

func fault(where string) func(string) error {
	var mu sync.Mutex
	if filepath.IsAbs(where) {
		return func(point string) error {
			mu.Lock()
			defer mu.Unlock()
			f, err := os.OpenFile(where, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = fmt.Fprintln(f, point)
			return err
		}
	}
	i := strings.LastIndexByte(where, '/')
	left, _ := strconv.Atoi(where[i+1:])
	return func(point string) error {
		mu.Lock()
		defer mu.Unlock()
		if point != where[:i] {
			return nil
		}
		if left--; left == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // it takes a moment
		}
		return nil
	}
}

// node is one test's use of the rig.
type node struct {
	*rig.Rig
	t *testing.T
}

func open(t *testing.T) *node {
	t.Helper()
	containerdtest.Need(t)
	if shared == nil {
		var err error
		if shared, err = rig.Open(rig.Config{
			Tenants:  "testdata/tenants",
			Images:   []string{image("python"), image("busybox")},
			Interval: "200ms",
		}); err != nil {
			t.Fatal(err)
		}
	}
	n := &node{Rig: shared, t: t}
	t.Cleanup(n.clear)
	return n
}

// image is the path of an archive that make setup has built.
func image(name string) string {
	root, err := containerdtest.RepoRoot()
	if err != nil {
		root = os.Getenv("BULKHEAD_REPO")
	}
	return filepath.Join(root, "build", "images", name+".tar")
}

// clear removes every sandbox, with whatever daemons it takes.
func (n *node) clear() {
	if n.t.Failed() {
		n.t.Logf("the agent's log ends with:\n%s", n.AgentLog())
	}
	n.Reconfigure(func(c *rig.Config) { c.Agent = "" })
	select {
	case <-n.AgentDead():
		if err := n.StartAgent(); err != nil {
			n.t.Error(err)
		}
	default:
	}
	if out, err := n.CLI("ls", "-aq"); err != nil {
		n.t.Errorf("ls: %v: %s", err, out)
	} else if ids := strings.Fields(out); len(ids) > 0 {
		if out, err := n.CLI(append([]string{"rm", "-f"}, ids...)...); err != nil {
			n.t.Errorf("rm: %v: %s", err, out)
		}
	}
}

// must runs the command line and answers its output.
func (n *node) must(args ...string) string {
	n.t.Helper()
	out, err := n.CLI(args...)
	if err != nil {
		n.t.Fatalf("bulkhead %.200q: %v: %s", args, err, out)
	}
	return out
}

// armed starts this program as the agent.
func (n *node) armed(where string) {
	n.t.Helper()
	self, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	n.Reconfigure(func(c *rig.Config) { c.Agent = self })
	defer n.Reconfigure(func(c *rig.Config) { c.Agent = "" })
	if err := n.StartAgent(crashEnv + "=" + where); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) stopAgent() {
	n.t.Helper()
	if err := n.StopAgent(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) startAgent() {
	n.t.Helper()
	if err := n.StartAgent(); err != nil {
		n.t.Fatal(err)
	}
}

// record is what these tests read of `bulkhead get -o json`.
type record struct {
	Sandbox struct {
		ID    string `json:"id"`
		State string `json:"state"`
		Pid   string `json:"pid"`
		Exit  struct {
			Reason  string `json:"reason"`
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"exit"`
	} `json:"sandbox"`
	Network struct {
		EgressBytes string `json:"egress_bytes"`
	} `json:"network"`
	Events []struct {
		Kind string `json:"kind"`
	} `json:"events"`
}

func (n *node) get(ref string) record {
	n.t.Helper()
	var r record
	out := n.must("get", "-o", "json", ref)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		n.t.Fatalf("get %s: %v: %s", ref, err, out)
	}
	return r
}

func (r record) kinds() string {
	var out []string
	for _, e := range r.Events {
		out = append(out, e.Kind)
	}
	return strings.Join(out, " ")
}

// usage answers the totals of a sandbox, of the node or of the gateway.
func (n *node) usage(id string, fromGateway bool) map[string]uint64 {
	n.t.Helper()
	args := []string{"usage", "-o", "json", "--sandbox", id}
	if fromGateway {
		args = append(args, "--gateway", n.Gateway)
	}
	out := map[string]uint64{}
	for line := range strings.Lines(n.must(args...)) {
		var row struct{ Meter, Total string }
		if err := json.Unmarshal([]byte(line), &row); err != nil {
			n.t.Fatalf("usage: %v: %s", err, line)
		}
		v, err := strconv.ParseUint(row.Total, 10, 64)
		if err != nil {
			n.t.Fatalf("usage: %v: %s", err, line)
		}
		out[row.Meter] += v
	}
	return out
}

// delivered waits until the ledger has what the node has metered, and answers
// that.
func (n *node) delivered(id string) map[string]uint64 {
	n.t.Helper()
	own := n.usage(id, false)
	var ledger map[string]uint64
	for range 100 {
		if ledger = n.usage(id, true); fmt.Sprint(ledger) == fmt.Sprint(own) {
			return own
		}
		time.Sleep(100 * time.Millisecond)
	}
	n.t.Errorf("the ledger has %v, the node %v", ledger, own)
	return own
}

// checkGone asserts that nothing of a sandbox is on the machine.
func (n *node) checkGone(id string) {
	n.t.Helper()
	var left []string
	links, err := rig.Leftovers()
	if err != nil {
		n.t.Error(err)
	}
	for _, l := range links {
		if strings.Contains(l, id) {
			left = append(left, l)
		}
	}
	for _, root := range []string{n.Dir, "/sys/fs/cgroup"} {
		out, _ := exec.Command("find", root, "-name", "*"+id+"*", "-not", "-path", "*/logs/*").Output()
		left = append(left, strings.Fields(string(out))...)
	}
	for _, what := range []string{"containers", "snapshots", "tasks"} {
		out, err := exec.Command(filepath.Join(n.Bin, "ctr"), "--address", n.Containerd.Address, "-n", "bulkhead", what, "ls").CombinedOutput()
		if err != nil {
			n.t.Errorf("ctr %s: %v: %s", what, err, out)
		}
		if strings.Contains(string(out), id) {
			left = append(left, what)
		}
	}
	for _, pid := range n.Containerd.ShimPids(id) {
		left = append(left, "shim "+strconv.Itoa(pid))
	}
	if len(left) > 0 {
		n.t.Errorf("left of %s: %q", id, left)
	}
}

// eventually waits until something holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for range 300 {
		if holds() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("not after 15 s: %s", what)
}
