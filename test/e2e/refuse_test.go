// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/rig"
)

func TestQuotas(t *testing.T) {
	n := open(t)
	small := []string{"run", "-d", "--tenant", "tiny", "--cpus", "100m", "--memory", "32MiB", "--pids", "8"}
	n.must(append(small, "--name", "a", busybox, "sleep", "3600")...)
	for _, c := range []struct {
		flags []string
		says  []string
	}{
		{[]string{"--cpus", "500m", "--memory", "32MiB", "--pids", "8"}, []string{"cpu", "0.5 wanted", "0.1 of 0.5", "tiny", "tiny.yaml"}},
		{[]string{"--cpus", "100m", "--memory", "100MiB", "--pids", "8"}, []string{"memory", "100MiB wanted", "32MiB of 128MiB", "tiny"}},
		{[]string{"--cpus", "100m", "--memory", "32MiB", "--pids", "60"}, []string{"processes", "60 wanted", "8 of 64", "tiny"}},
	} {
		n.refuse(1, c.says, append(append([]string{"run", "--tenant", "tiny"}, c.flags...), busybox, "true")...)
	}
	n.must(append(small, "--name", "b", busybox, "sleep", "3600")...)
	n.refuse(1, []string{"sandboxes", "2 of 2", "tiny"}, append(small, busybox, "true")...)
	n.must("stop", "a")
	n.must(append(small, "--name", "c", busybox, "sleep", "3600")...)
	if out := n.must("tenant", "ls"); !strings.Contains(out, "tiny") || !strings.Contains(out, "64MiB") {
		t.Errorf("tenant ls does not show what is in use:\n%s", out)
	}
}

// TestBadRequests: each is refused in one line that says what is wrong.
func TestBadRequests(t *testing.T) {
	n := open(t)
	n.start("taken", "acme", busybox)
	big := filepath.Join(t.TempDir(), "env")
	write(t, big, "A="+strings.Repeat("x", 300<<10)+"\n")
	run := func(flags ...string) []string {
		return append(append([]string{"run", "--tenant", "acme"}, flags...), busybox, "true")
	}
	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"run", "--tenant", "acme", "nosuch:1", "true"}, []string{"nosuch:1"}},
		{[]string{"run", "--tenant", "acme", "UPPER/case:!", "true"}, []string{"UPPER/case:!"}},
		{[]string{"run", "--tenant", "initech", busybox, "true"}, []string{"initech", "not known"}},
		{[]string{"run", "--tenant", "acme/nosuch", busybox, "true"}, []string{"acme/nosuch", "not known"}},
		{[]string{"run", "--tenant", "../etc", busybox, "true"}, []string{"../etc"}},
		{[]string{"run", busybox, "true"}, []string{"tenant"}},
		{run("--runtime", "gvisor"), []string{"gvisor", "runc"}},
		{run("--name", "taken"), []string{"taken", "already"}},
		{run("--name", "a/b"), []string{"a/b"}},
		{run("--name", "-x"), []string{"-x"}},
		{run("--name", strings.Repeat("x", 64)), []string{"63"}},
		{run("--name", "aaaaaaaaaaaa"), []string{"form of an id"}},
		{run("--cpus", "0"), []string{"cpus"}},
		{run("--cpus", "-1"), []string{"-1"}},
		{run("--cpus", "lots"), []string{"lots"}},
		{run("--cpus", "5000"), []string{"cpus", "more than this node has"}},
		{run("--memory", "0"), []string{"memory"}},
		{run("--memory", "64"), []string{"64"}},
		{run("--memory", "-64MiB"), []string{"-64MiB"}},
		{run("--memory", "1KiB"), []string{"memory", "too little"}},
		{run("--memory", "900TiB"), []string{"memory", "more than this node has"}},
		{run("--pids", "-5"), []string{"-5"}},
		{run("--pids", "1000000"), []string{"pids", "more than this node has"}},
		{run("--ttl", "-1s"), []string{"ttl"}},
		{run("--ttl", "1ms"), []string{"ttl"}},
		{run("-e", "=x"), []string{"=x"}},
		{run("-w", "relative"), []string{"relative", "absolute"}},
		{run("--env-file", big), []string{"at most"}},
		{[]string{"get", "nosuch"}, []string{"nosuch"}},
		{[]string{"stop", "nosuch"}, []string{"nosuch"}},
		{[]string{"explain", "taken", "tcp", "exa_mple..com:80"}, []string{"exa_mple..com"}},
		{[]string{"explain", "taken", "sctp", "1.2.3.4:80"}, []string{"sctp"}},
		{[]string{"explain", "taken", "tcp", "1.2.3.4:0"}, []string{"0"}},
		{[]string{"explain", "taken", "tcp", "1.2.3.4:70000"}, []string{"70000"}},
	} {
		r := n.do(c.args...)
		if r.code != 1 && r.code != 2 || strings.Contains(r.err, "rpc error") || strings.Contains(r.err, "goroutine") {
			t.Errorf("bulkhead %.200q: %s", c.args, r)
		}
		for _, text := range c.says {
			if !strings.Contains(r.err, text) {
				t.Errorf("bulkhead %.200q says %.300q, want %q in it", c.args, r.err, text)
			}
		}
	}
	if ids := strings.Fields(n.must("ls", "-aq")); len(ids) != 1 {
		t.Errorf("refusals left %d records", len(ids)-1)
	}
}

// TestBadTenantFiles: a reload with a fault says file, line and the nearest
// name, and changes nothing.
func TestBadTenantFiles(t *testing.T) {
	n := open(t)
	n.start("box", "acme", busybox)
	before := n.must("tenant", "ls")
	policy := func(rules string) string {
		return "kind: Tenant\npath: bad\npolicy:\n  name: bad\n  rules:\n" + rules
	}
	file := filepath.Join(n.TenantsDir, "bad.yaml")
	t.Cleanup(func() { os.Remove(file); n.must("reload") })
	for _, c := range []struct {
		name, text string
		says       []string
	}{
		{"unknown key", "kind: Tenant\npath: bad\nquotta: {cpu: 1}\n", []string{"bad.yaml:3", "quotta", "quota"}},
		{"unknown quota", "kind: Tenant\npath: bad\nquota: {memmory: 1GiB}\n", []string{"bad.yaml:3", "memmory", "memory"}},
		{"zero quota", "kind: Tenant\npath: bad\nquota: {cpu: 0}\n", []string{"bad.yaml:3", "cpu"}},
		{"negative quota", "kind: Tenant\npath: bad\nquota: {memory: -1GiB}\n", []string{"bad.yaml:3", "-1GiB"}},
		{"unknown unit", "kind: Tenant\npath: bad\nquota: {memory: 100GB}\n", []string{"bad.yaml:3", "100GB"}},
		{"no parent", "kind: Tenant\npath: bad/child\n", []string{"bad.yaml:2", "parent"}},
		{"two of one path", "kind: Tenant\npath: globex\n", []string{"globex", "already"}},
		{"kind", "kind: Tennant\npath: bad\n", []string{"bad.yaml:1", "Tennant", "Tenant"}},
		{"not YAML", "kind: [\n", []string{"bad.yaml"}},
		{"empty to", policy("  - name: x\n    action: allow\n    to: []\n    ports: [80/tcp]\n"), []string{"bad.yaml:8", "to"}},
		{"no to", policy("  - name: x\n    action: allow\n    ports: [80/tcp]\n"), []string{"bad.yaml:6", "to"}},
		{"mapped prefix", policy("  - name: x\n    action: allow\n    to: [{cidr: \"::ffff:203.0.113.0/120\"}]\n    ports: [80/tcp]\n"), []string{"bad.yaml:8", "203.0.113.0/24"}},
		{"host bits", policy("  - name: x\n    action: allow\n    to: [{cidr: 203.0.113.7/24}]\n    ports: [80/tcp]\n"), []string{"bad.yaml:8", "203.0.113.0/24"}},
		{"port 0", policy("  - name: x\n    action: allow\n    to: [{cidr: 203.0.113.0/24}]\n    ports: [0/tcp]\n"), []string{"bad.yaml:9", "0"}},
		{"port 70000", policy("  - name: x\n    action: allow\n    to: [{cidr: 203.0.113.0/24}]\n    ports: [70000/tcp]\n"), []string{"bad.yaml:9", "70000"}},
		{"backward range", policy("  - name: x\n    action: allow\n    to: [{cidr: 203.0.113.0/24}]\n    ports: [90-80/tcp]\n"), []string{"bad.yaml:9", "90-80"}},
		{"protocol", policy("  - name: x\n    action: allow\n    to: [{cidr: 203.0.113.0/24}]\n    ports: [80/tpc]\n"), []string{"bad.yaml:9", "tpc", "tcp"}},
		{"rule twice", policy("  - {name: x, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [80/tcp]}\n  - {name: x, action: deny, to: [{cidr: 203.0.113.0/24}]}\n"), []string{"bad.yaml:7", "x"}},
		{"any name", policy("  - name: x\n    action: allow\n    to: [{fqdn: \"*\"}]\n    ports: [80/tcp]\n"), []string{"bad.yaml:8", "*"}},
		{"star inside", policy("  - name: x\n    action: allow\n    to: [{fqdn: api.*.example.com}]\n    ports: [80/tcp]\n"), []string{"bad.yaml:8", "api.*.example.com"}},
		{"rate without unit", policy("  - {name: x, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [80/tcp], rate: 100}\n"), []string{"bad.yaml:6", "100"}},
		{"budget without end", policy("  - {name: x, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [80/tcp]}\n  budget: {egress: 1GiB, per: day}\n"), []string{"bad.yaml:7", "then"}},
	} {
		write(t, file, c.text)
		r := n.do("reload")
		if r.code == 0 || !strings.Contains(r.err, "reload refused") {
			t.Errorf("%s: %s", c.name, r)
		}
		for _, text := range c.says {
			if !strings.Contains(r.err, text) {
				t.Errorf("%s: it says %q, want %q in it", c.name, r.err, text)
			}
		}
	}
	if after := n.must("tenant", "ls"); after != before {
		t.Errorf("tenants changed:\n%s\n%s", before, after)
	}
	if rev := n.get("box").Sandbox.PolicyRev; rev != "1" {
		t.Errorf("the policy of a running sandbox went to revision %s", rev)
	}
	// A tenant whose sandboxes run cannot go.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	acme := filepath.Join(n.TenantsDir, "acme.yaml")
	if err := os.Rename(acme, acme+".away"); err != nil {
		t.Fatal(err)
	}
	r := n.do("reload")
	if err := os.Rename(acme+".away", acme); err != nil {
		t.Fatal(err)
	}
	if r.code == 0 || !strings.Contains(r.err, "acme") {
		t.Errorf("reload without acme: %s", r)
	}
}

// agent runs the agent's program to its end.
func (n *node) agent(config string) result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "bulkhead-agent"), "--config", config)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	_ = cmd.Run()
	if ctx.Err() != nil {
		n.t.Errorf("the agent runs on: %s", errOut.String())
	}
	return result{out: out.String(), err: errOut.String(), code: cmd.ProcessState.ExitCode()}
}

func TestBadConfiguration(t *testing.T) {
	n := open(t)
	good, err := os.ReadFile(filepath.Join(n.Dir, "bulkhead-agent.toml"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "agent.toml")
	before, _, _ := strings.Cut(string(good), "verify_every")
	line := fmt.Sprintf(":%d:", strings.Count(before, "\n")+1)
	for _, c := range []struct {
		name string
		edit func(string) string
		says []string
	}{
		{"unknown key", func(s string) string { return strings.Replace(s, "verify_every", "verify_evry", 1) }, []string{"verify_evry", "verify_every", line}},
		{"no unit", func(s string) string { return strings.Replace(s, `"2s"`, `"2"`, 1) }, []string{"agent.toml:", "2"}},
		{"relative path", func(s string) string { return strings.Replace(s, `state_dir = "/`, `state_dir = "`, 1) }, []string{"state_dir", "absolute"}},
		{"pool", func(s string) string { return strings.Replace(s, rig.Pool4, "100.64.0.1", 1) }, []string{"agent.toml:"}},
		{"not TOML", func(s string) string { return s + "[[[\n" }, []string{"agent.toml:"}},
		{"no such file", nil, []string{"nosuch.toml"}},
	} {
		path := file
		if c.edit == nil {
			path = filepath.Join(dir, "nosuch.toml")
		} else {
			write(t, file, c.edit(string(good)))
		}
		r := n.agent(path)
		if r.code != 2 || strings.Count(strings.TrimSpace(r.err), "\n") > 0 {
			t.Errorf("%s: want exit 2 and one line: %s", c.name, r)
		}
		for _, text := range c.says {
			if !strings.Contains(r.err, text) {
				t.Errorf("%s: it says %q, want %q in it", c.name, r.err, text)
			}
		}
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	n := open(t)
	n.start("box", "acme", busybox)
	r := n.agent(filepath.Join(n.Dir, "bulkhead-agent.toml"))
	if r.code == 0 || !strings.Contains(r.err, "another agent") || strings.Count(strings.TrimSpace(r.err), "\n") > 0 {
		t.Errorf("a second agent: %s", r)
	}
	if out := n.must("exec", "box", "echo", "alive"); out != "alive" {
		t.Errorf("the first one: %q", out)
	}
}

// TestNoContainerd: what runs goes on and is answered for; nothing new starts,
// and it is said what is missing and how to get it. An agent that starts
// meanwhile adopts what it can.
func TestNoContainerd(t *testing.T) {
	n := open(t)
	n.must("run", "-d", "--name", "pump", "--tenant", "acme", python, "python3", "-c", pump)
	moves := func() bool {
		start := n.Net.Received.Load()
		time.Sleep(400 * time.Millisecond)
		return n.Net.Received.Load() > start
	}
	eventually(t, "the pump sends", moves)
	if err := n.Containerd.Kill(); err != nil {
		t.Fatal(err)
	}
	up := sync.OnceFunc(func() {
		if err := n.Containerd.Up(); err != nil {
			t.Error(err)
		}
	})
	defer up()
	check := func() {
		t.Helper()
		n.refuse(1, []string{n.Containerd.Address, "systemctl status containerd"}, "run", "--tenant", "acme", busybox, "true")
		if out := n.must("node"); !strings.Contains(out, "containerd does not answer") || !strings.Contains(out, "systemctl status containerd") {
			t.Errorf("node says:\n%s", out)
		}
		if out := n.must("explain", "pump", "tcp", "203.0.113.10:5001"); !strings.HasPrefix(out, "ALLOW") {
			t.Errorf("explain: %s", out)
		}
		if !moves() {
			t.Error("the pump does not send any more")
		}
	}
	check()
	if err := n.KillAgent(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartAgent(); err != nil {
		t.Fatal(err)
	}
	check()
	up()
	if r := n.do("run", "--rm", "--tenant", "acme", busybox, "echo", "back"); r.out != "back\n" {
		t.Errorf("once containerd is back: %s", r)
	}
	eventually(t, "the pump is adopted", func() bool { return strings.Contains(n.get("pump").kinds(), "adopted") })
	if out := n.must("exec", "pump", "echo", "alive"); out != "alive" {
		t.Errorf("exec: %q", out)
	}
	if k := n.get("pump").kinds(); strings.Contains(k, "drift") {
		t.Errorf("events: %s", k)
	}
}

// TestOtherUsers: a user of the node sees and touches what its tenants have,
// as the kernel says who it is, and what others have does not exist for it.
func TestOtherUsers(t *testing.T) {
	n := open(t)
	if err := os.Chmod(n.Socket, 0o666); err != nil { // as a group would be let in
		t.Fatal(err)
	}
	if err := os.Chmod(n.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	foreign := n.start("foreign", "globex", busybox).Sandbox.ID
	as := func(uid uint32, args ...string) result {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		var out, errOut bytes.Buffer
		cmd := n.Command(ctx, args...)
		cmd.Stdout, cmd.Stderr = &out, &errOut
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		_ = cmd.Run()
		return result{out: out.String(), err: errOut.String(), code: cmd.ProcessState.ExitCode()}
	}
	if r := as(1000, "run", "--name", "mine", "--tenant", "acme", busybox, "echo", "hello"); r.out != "hello\n" {
		t.Errorf("a member of acme: %s", r)
	}
	if r := as(1001, "run", "-d", "--name", "team", "--tenant", "acme/vision", busybox, "sleep", "3600"); r.code != 0 {
		t.Errorf("a member of acme/vision: %s", r)
	}
	team := n.get("team").Sandbox.ID
	if e := n.get("mine").Events; len(e) == 0 || !strings.Contains(e[0].Message, "uid:1000") {
		t.Errorf("the record does not say who made it: %+v", e)
	}
	for _, c := range []struct {
		uid  uint32
		sees int
	}{{1000, 2}, {1001, 1}, {4321, 0}} {
		r := as(c.uid, "ls", "-aq")
		if ids := strings.Fields(r.out); len(ids) != c.sees || strings.Contains(r.out, foreign) {
			t.Errorf("uid %d lists %q, want %d of them", c.uid, ids, c.sees)
		}
		for _, args := range [][]string{{"get", foreign}, {"logs", foreign}, {"exec", foreign, "id"}, {"stop", foreign}, {"rm", "-f", foreign}, {"explain", foreign, "tcp", "1.2.3.4:80"}} {
			if r := as(c.uid, args...); r.code != 1 || !strings.Contains(r.err, "no such sandbox") {
				t.Errorf("uid %d, %q: %s", c.uid, args, r)
			}
		}
		for _, args := range [][]string{{"run", "--tenant", "globex", busybox, "true"}, {"image", "import", "/etc/hostname"}, {"image", "pull", "x"}, {"reload"}} {
			if r := as(c.uid, args...); r.code != 1 || !strings.Contains(r.err, "may not") {
				t.Errorf("uid %d, %q: %s", c.uid, args, r)
			}
		}
	}
	if r := as(1001, "run", "--tenant", "acme", busybox, "true"); r.code != 1 || !strings.Contains(r.err, "may not act for acme") {
		t.Errorf("a member of the team acts for the organisation: %s", r)
	}
	if r := as(1000, "rm", "-f", team); r.code != 0 {
		t.Errorf("a member of the organisation, with the team's sandbox: %s", r)
	}
	if out := n.must("exec", "foreign", "echo", "alive"); out != "alive" {
		t.Errorf("the other tenant's sandbox: %q", out)
	}
}

func TestNoAgent(t *testing.T) {
	n := open(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := n.Command(ctx, "--socket", "/nowhere/agent.sock", "ls").CombinedOutput()
	if rig.ExitCode(err) != 1 || !strings.Contains(string(out), "/nowhere/agent.sock") || !strings.Contains(string(out), "systemctl status bulkhead-agent") {
		t.Errorf("ls without an agent: %v: %s", err, out)
	}
}

// TestImages: damaged archives change nothing; a registry works.
func TestImages(t *testing.T) {
	n := open(t)
	whole, err := os.ReadFile(image("busybox"))
	if err != nil {
		t.Fatal(err)
	}
	before := n.must("image", "ls")
	half := filepath.Join(t.TempDir(), "half.tar")
	write(t, half, string(whole[:len(whole)/2]))
	n.refuse(1, nil, "image", "import", half)
	write(t, half, "this is no archive")
	n.refuse(1, nil, "image", "import", half)
	write(t, half, "")
	n.refuse(1, nil, "image", "import", half)
	n.refuse(1, []string{"nosuch.tar"}, "image", "import", "nosuch.tar")
	if after := n.must("image", "ls"); after != before {
		t.Errorf("damaged archives changed the images:\n%s\n%s", before, after)
	}
	if r := n.feed(bytes.NewReader(whole), "image", "import", "-"); r.code != 0 || !strings.Contains(r.out, busybox) {
		t.Errorf("import from standard input: %s", r)
	}

	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer reg.Close()
	ref := strings.TrimPrefix(reg.URL, "http://") + "/team/box:7"
	push(t, image("busybox"), ref)
	if out := n.must("image", "pull", "--plain-http", ref); !strings.Contains(out, "box:7") && !strings.Contains(n.must("image", "ls"), ref) {
		t.Errorf("pull says %q", out)
	}
	if r := n.do("run", "--rm", "--tenant", "acme", ref, "echo", "pulled"); r.out != "pulled\n" {
		t.Errorf("run of a pulled image: %s", r)
	}
	n.refuse(1, []string{"nosuch:1"}, "image", "pull", "--plain-http", strings.TrimPrefix(reg.URL, "http://")+"/nosuch:1")
	n.refuse(1, []string{"127.0.0.1:9"}, "image", "pull", "--plain-http", "127.0.0.1:9/team/box:7")
}

// push sends the image of an archive to a registry.
func push(t *testing.T, archive, ref string) {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.Clean("/"+h.Name))
		if h.Typeflag == tar.TypeDir {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		write(t, path, string(data))
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
}

// TestFullDisk: a run is refused with a clear error and leaves nothing half
// made, what runs goes on, and all is well once there is room.
func TestFullDisk(t *testing.T) {
	n := open(t)
	state := filepath.Join(n.Dir, "state")
	if err := n.StopAgent(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.StopAgent(); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if err := n.StartAgent(); err != nil {
			t.Error(err)
		}
	}()
	if err := n.StartAgent(); err != nil {
		t.Fatal(err)
	}
	defer n.clear() // before the state goes
	n.must("run", "-d", "--name", "ticker", "--tenant", "acme", "--cpus", "300m", "--memory", "96MiB", python,
		"python3", "-c", "import time, urllib.request\nwhile True: urllib.request.urlopen('http://203.0.113.10/tick').read(); time.sleep(0.05)")
	ticks := func() bool {
		start := n.Net.Requests("api")
		time.Sleep(500 * time.Millisecond)
		return n.Net.Requests("api") > start
	}
	eventually(t, "the ticker ticks", ticks)
	n.must("run", "--name", "before", "--tenant", "acme", busybox, "true")

	filler := filepath.Join(state, "filler")
	defer os.Remove(filler)
	fill(t, filler)
	for i := range 3 {
		r := n.do("run", "--name", "refused", "--tenant", "acme", busybox, "true")
		if r.code != 1 || !strings.Contains(r.err, "no space left on device") {
			t.Errorf("run %d on a full disk: %s", i, r)
		}
	}
	if !ticks() {
		t.Error("a running sandbox does not go on")
	}
	if out := n.must("exec", "ticker", "echo", "alive"); out != "alive" {
		t.Errorf("exec with a full disk: %q", out)
	}
	if out := n.must("node"); !strings.Contains(out, "no space left on device") {
		t.Errorf("node does not say that usage cannot be recorded:\n%s", out)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	eventually(t, "sandboxes start again", func() bool {
		n.do("rm", "-f", "refused")
		return n.do("run", "--name", "refused", "--tenant", "acme", busybox, "true").code == 0
	})
	if !ticks() {
		t.Error("the ticker does not tick any more")
	}
	eventually(t, "the warning goes", func() bool { return !strings.Contains(n.must("node"), "no space left") })
	id := n.get("ticker").Sandbox.ID
	n.must("stop", "ticker")
	own := n.usage(id, false)
	eventually(t, "its usage arrives", func() bool { return n.usage(id, true)["wall_ms"] == own["wall_ms"] && own["egress_bytes"] > 0 })
	if links, err := rig.Leftovers(); err != nil || strings.Contains(strings.Join(links, " "), "link bt"+id) {
		t.Errorf("left: %q, %v", links, err)
	}
}

// fill writes a file until the disk is full.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{64 << 10, 4 << 10, 1} {
		buf := make([]byte, size)
		for {
			if _, err := f.Write(buf); err != nil {
				break
			}
		}
	}
}
