// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the whole of Bulkhead through its command line, as its
// users meet it: a real agent, gateway, containerd and runc, network
// namespaces and the datapath in the kernel.
//
// All tests share one rig, which the first of them starts, and run one after
// the other. Each removes its sandboxes, also when it fails.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/containerdtest"
	"github.com/bulkheadhq/bulkhead/test/rig"
)

const (
	busybox = "bulkhead.local/busybox:1"
	python  = "bulkhead.local/python:3"
)

// shared is the rig of all tests; nil until the first needs it.
var shared *rig.Rig

func TestMain(m *testing.M) {
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

// node is one test's use of the rig.
type node struct {
	*rig.Rig
	t *testing.T
}

func open(t *testing.T) *node {
	t.Helper()
	containerdtest.Need(t)
	if shared == nil {
		r, err := rig.Open(rig.Config{
			Tenants: "testdata/tenants",
			Images:  []string{image("busybox"), image("python")},
			Network: "publish_ports = \"30000-30999\"\n",
		})
		if err != nil {
			t.Fatal(err)
		}
		shared = r
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

// clear removes every sandbox and says what the agent logged if the test has
// failed.
func (n *node) clear() {
	if n.t.Failed() {
		n.t.Logf("the agent's log ends with:\n%s", n.AgentLog())
	}
	if out, err := n.CLI("ls", "-aq"); err != nil {
		n.t.Errorf("ls: %v: %s", err, out)
	} else if ids := strings.Fields(out); len(ids) > 0 {
		if out, err := n.CLI(append([]string{"rm", "-f"}, ids...)...); err != nil {
			n.t.Errorf("rm: %v: %s", err, out)
		}
	}
}

// result of a command line.
type result struct {
	out, err string
	code     int
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %.2000s\nstderr: %.2000s", r.code, r.out, r.err)
}

// do runs the command line.
func (n *node) do(args ...string) result {
	n.t.Helper()
	return n.feed(nil, args...)
}

// feed is do with input.
func (n *node) feed(in io.Reader, args ...string) result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := n.Command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatalf("bulkhead %q: %v", args, err)
	}
	if ctx.Err() != nil {
		n.t.Fatalf("bulkhead %.200q did not end: %s", args, errOut.String())
	}
	return result{out: out.String(), err: errOut.String(), code: cmd.ProcessState.ExitCode()}
}

// must runs the command line and answers its output, trimmed.
func (n *node) must(args ...string) string {
	n.t.Helper()
	r := n.do(args...)
	if r.code != 0 {
		n.t.Fatalf("bulkhead %.300q: %s", args, r)
	}
	return strings.TrimSpace(r.out)
}

// refuse asserts that a command line ends with a code and one line that holds
// every text.
func (n *node) refuse(code int, texts []string, args ...string) {
	n.t.Helper()
	r := n.do(args...)
	if r.code != code {
		n.t.Errorf("bulkhead %.300q: %s\nwant exit %d", args, r, code)
	}
	for _, text := range texts {
		if !strings.Contains(r.err, text) {
			n.t.Errorf("bulkhead %.300q says %q, want %q in it", args, r.err, text)
		}
	}
	if lines := strings.Count(strings.TrimRight(r.err, "\n"), "\n") + 1; code != 2 && lines > 2 {
		n.t.Errorf("bulkhead %.300q: the refusal has %d lines:\n%s", args, lines, r.err)
	}
}

// record is what `bulkhead get -o json` answers.
type record struct {
	Sandbox struct {
		ID        string   `json:"id"`
		State     string   `json:"state"`
		Pid       string   `json:"pid"`
		Addresses []string `json:"addresses"`
		PolicyRev string   `json:"policy_rev"`
		Exit      struct {
			Reason  string `json:"reason"`
			Code    int    `json:"code"`
			Message string `json:"message"`
			By      string `json:"by"`
		} `json:"exit"`
	} `json:"sandbox"`
	Network struct {
		EgressBytes   string `json:"egress_bytes"`
		IngressBytes  string `json:"ingress_bytes"`
		EgressPackets string `json:"egress_packets"`
	} `json:"network"`
	Events []struct {
		Kind    string `json:"kind"`
		Message string `json:"message"`
	} `json:"events"`
	Drops []struct {
		Reason  string `json:"reason"`
		Packets string `json:"packets"`
	} `json:"drops"`
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

// dropped answers how many packets were dropped for a reason.
func (r record) dropped(reason string) int {
	for _, d := range r.Drops {
		if d.Reason == reason {
			return number(d.Packets)
		}
	}
	return 0
}

// kinds of a record's events.
func (r record) kinds() string {
	var out []string
	for _, e := range r.Events {
		out = append(out, e.Kind)
	}
	return strings.Join(out, " ")
}

func number(s string) int {
	v, _ := strconv.Atoi(s)
	return v
}

// start runs a detached sandbox that sleeps and answers its record.
func (n *node) start(name, tenant, image string, flags ...string) record {
	n.t.Helper()
	args := []string{"run", "-d", "--name", name, "--tenant", tenant, "--cpus", "500m", "--memory", "64MiB"}
	n.must(append(append(args, flags...), image, "sleep", "3600")...)
	return n.get(name)
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
