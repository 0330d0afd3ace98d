// SPDX-License-Identifier: Apache-2.0

package systemd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/containerdtest"
)

// containerdUnit is as containerd's own packages have it, without what is for
// Kubernetes.
const containerdUnit = `[Unit]
After=network.target
[Service]
Type=notify
ExecStart=/usr/bin/containerd
Delegate=yes
KillMode=process
Restart=always
`

// TestAgentService installs the agent as an operator does and shows that
// systemd may restart, kill and stop it, and reload itself, and a sandbox of
// the first start runs on with its limits.
func TestAgentService(t *testing.T) {
	needSystemd(t)
	install(t)
	output(t, "systemctl", "daemon-reload")
	start := time.Now()
	systemctl(t, "start", "bulkhead-agent.service")
	t.Logf("started with containerd in %.1fs", time.Since(start).Seconds())
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(output(t, "journalctl", "--no-pager", "-u", "bulkhead-agent", "-n", "60"))
		}
	})

	output(t, "bulkhead", "image", "import", filepath.Join(repo(t), "build/images/busybox.tar"))
	marker := fmt.Sprint(100_000 + os.Getpid())
	id := output(t, "bulkhead", "run", "-d", "--name", "steady", "--tenant", "acme", "--cpus", "0.5", "--memory", "48MiB",
		"bulkhead.local/busybox:1", "sleep", marker)
	pid := sandboxPID(t, marker)
	group := cgroupOf(t, pid)
	if !strings.HasPrefix(group, "/bulkhead.slice/") || !strings.Contains(group, "acme") {
		t.Errorf("sandbox runs in %s, want it below /bulkhead.slice/ and its tenant", group)
	}
	limits := readLimits(t, group)
	if want := "50000 100000 50331648"; limits != want {
		t.Errorf("limits %q, want %q", limits, want)
	}

	still := func(what string) {
		t.Helper()
		if now := sandboxPID(t, marker); now != pid {
			t.Errorf("after %s the sandbox's process is %d, want %d", what, now, pid)
		}
		if now := cgroupOf(t, pid); now != group {
			t.Errorf("after %s the sandbox is in %s, want %s", what, now, group)
		}
		if now := readLimits(t, group); now != limits {
			t.Errorf("after %s the limits are %q, want %q", what, now, limits)
		}
	}
	adopted := func(what string) {
		t.Helper()
		if got := output(t, "bulkhead", "ls", "-q"); !strings.Contains(got, id) {
			t.Errorf("after %s bulkhead ls -q says %q, want %s in it", what, got, id)
		}
	}

	first := mainPID(t)
	systemctl(t, "restart", "bulkhead-agent.service")
	if mainPID(t) == first {
		t.Error("the agent is the same process after a restart")
	}
	still("a restart")
	adopted("a restart")

	second := mainPID(t)
	systemctl(t, "kill", "--signal=KILL", "--kill-whom=main", "bulkhead-agent.service")
	await(t, "systemd starts a killed agent again", func() bool {
		pid := mainPID(t)
		return pid != "0" && pid != second && active(t)
	})
	still("a kill")
	adopted("a kill")

	output(t, "systemctl", "daemon-reload")
	output(t, "systemctl", "daemon-reexec")
	still("systemd's reload")

	systemctl(t, "stop", "bulkhead-agent.service")
	still("a stop")
	systemctl(t, "start", "bulkhead-agent.service")
	still("a start")
	adopted("a start")

	output(t, "bulkhead", "stop", "--grace", "1s", "steady")
	if _, err := os.Stat("/sys/fs/cgroup" + group); !os.IsNotExist(err) {
		t.Errorf("the stopped sandbox's cgroup: %v, want it gone", err)
	}
	checkJournal(t)
}

// checkJournal wants every line of the agent to be a JSON object.
func checkJournal(t *testing.T) {
	t.Helper()
	lines := 0
	for line := range strings.Lines(output(t, "journalctl", "--no-pager", "-o", "cat", "_COMM=bulkhead-agent")) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("the agent wrote a line that is not JSON: %s", line)
		}
		lines++
	}
	if lines == 0 {
		t.Error("the agent wrote nothing to the journal")
	}
}

// install puts programs, units and configuration where packages put them.
func install(t *testing.T) {
	t.Helper()
	root, bin := repo(t), containerdtest.Need(t)
	for _, name := range []string{"bulkhead", "bulkhead-agent", "bulkhead-log", "containerd", "containerd-shim-runc-v2", "runc"} {
		copyFile(t, filepath.Join(bin, name), "/usr/bin/"+name, 0o755)
	}
	copyFile(t, filepath.Join(root, "agent/config/bulkhead-agent.toml"), "/etc/bulkhead/bulkhead-agent.toml", 0o600)
	copyFile(t, filepath.Join(root, "deploy/systemd/bulkhead-agent.service"), "/etc/systemd/system/bulkhead-agent.service", 0o644)
	tenants, err := filepath.Glob(filepath.Join(root, "deploy/examples/tenants/*.yaml"))
	if err != nil || len(tenants) == 0 {
		t.Fatalf("example tenants: %d files, %v", len(tenants), err)
	}
	for _, file := range tenants {
		copyFile(t, file, "/etc/bulkhead/tenants/"+filepath.Base(file), 0o644)
	}
	if err := os.WriteFile("/etc/systemd/system/containerd.service", []byte(containerdUnit), 0o644); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string, mode os.FileMode) {
	t.Helper()
	body, err := os.ReadFile(from)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o755)
	}
	if err == nil {
		// Not written through a link that the host may have there.
		err = os.RemoveAll(to)
	}
	if err == nil {
		err = os.WriteFile(to, body, mode)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func repo(t *testing.T) string {
	t.Helper()
	root, err := containerdtest.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func systemctl(t *testing.T, args ...string) { t.Helper(); output(t, "systemctl", args...) }

func mainPID(t *testing.T) string {
	t.Helper()
	return output(t, "systemctl", "show", "--property=MainPID", "--value", "bulkhead-agent.service")
}

func active(t *testing.T) bool {
	t.Helper()
	return output(t, "systemctl", "show", "--property=ActiveState", "--value", "bulkhead-agent.service") == "active"
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if done() {
			return
		}
	}
	t.Fatalf("%s: not within a minute", what)
}

// sandboxPID finds the one process whose command is sleep marker.
func sandboxPID(t *testing.T, marker string) int {
	t.Helper()
	found := 0
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range processes {
		cmdline, err := os.ReadFile(file)
		if err != nil || !bytes.Equal(cmdline, []byte("sleep\x00"+marker+"\x00")) {
			continue
		}
		if found != 0 {
			t.Fatalf("two processes run sleep %s", marker)
		}
		if _, err := fmt.Sscanf(file, "/proc/%d/", &found); err != nil {
			t.Fatal(err)
		}
	}
	if found == 0 {
		t.Fatalf("no process runs sleep %s", marker)
	}
	return found
}

func cgroupOf(t *testing.T, pid int) string {
	t.Helper()
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(strings.TrimSpace(string(body)), "0::")
}

// readLimits answers cpu.max and memory.max of a group.
func readLimits(t *testing.T, group string) string {
	t.Helper()
	var all []string
	for _, file := range []string{"cpu.max", "memory.max"} {
		body, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", group, file))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.Fields(string(body))...)
	}
	return strings.Join(all, " ")
}
