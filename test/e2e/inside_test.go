// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/bulkheadhq/bulkhead/test/need"
	"time"
)

// TestWhatASandboxSees: the whole of the hardening, seen from inside as root.
func TestWhatASandboxSees(t *testing.T) {
	n := open(t)
	other := n.start("neighbour", "globex", busybox)
	n.start("box", "acme", python)
	for _, c := range []struct{ name, command, want string }{
		{"capabilities", "grep -E '^Cap(Eff|Prm|Inh|Amb)' /proc/self/status | tr -d '\\t\\n'",
			"CapInh:0000000000000000CapPrm:00000000000004fbCapEff:00000000000004fbCapAmb:0000000000000000"},
		{"bounding set", "grep CapBnd /proc/self/status | tr -d '\\t'", "CapBnd:00000000000004fb"},
		{"no new privileges", "grep NoNewPrivs /proc/self/status | tr -d '\\t'", "NoNewPrivs:1"},
		{"seccomp filter", "grep ^Seccomp: /proc/self/status | tr -d '\\t'", "Seccomp:2"},
		{"core dumps", "ulimit -c", "0"},
		{"devices", "ls /dev | tr '\\n' ' '", "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"},
		{"mount", "mount -t tmpfs none /mnt 2>&1; echo $?", "*perm"},
		{"new device", "mknod /dev/kmem c 1 2 2>&1; echo $?", "*perm"},
		{"host disk", "ls /dev/[sv]d* /dev/nvme* 2>/dev/null; echo none", "none"},
		{"user namespace", "unshare -r true 2>&1; echo $?", "*perm"},
		{"sysctl", "(echo 1 > /proc/sys/net/ipv4/ip_forward) 2>&1; echo $?", "*read-only"},
		{"sysrq", "(echo b > /proc/sysrq-trigger) 2>/dev/null && echo written; echo alive", "alive"},
		{"kernel memory", "cat /proc/kcore 2>/dev/null | head -c 1 | wc -c", "0"},
		{"other processes", "ls -d /proc/[0-9]* | wc -l | awk '{ print ($1 < 8) ? \"few\" : $1 }'", "few"},
		{"cgroup namespace", "cut -d: -f3 /proc/self/cgroup | sort -u", "/"},
		{"own network only", "ls /sys/class/net | tr '\\n' ' '", "eth0 lo"},
		{"other tenants' cgroups", "find /sys/fs/cgroup /run /tmp /var -name '*" + other.Sandbox.ID + "*' 2>/dev/null | wc -l", "0"},
		{"traces of others", "cat /proc/*/mountinfo /proc/mounts /proc/*/environ 2>/dev/null | grep -c " + other.Sandbox.ID, "0"},
		{"cgroup is read-only", "mkdir /sys/fs/cgroup/x 2>&1 || find /sys/fs/cgroup -maxdepth 2 -name cgroup.procs -exec sh -c 'echo 1 > {}' \\; 2>&1 | head -1", "*read-only"},
		{"keys", "cat /proc/keys 2>/dev/null | wc -l", "0"},
		{"raw socket", `python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 6)' 2>&1 | tail -1`, "*not permitted"},
		{"packet socket", `python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)' 2>&1 | tail -1`, "*not permitted"},
		{"bpf", `python3 -c 'import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(321, 5, 0, 0), ctypes.get_errno())'`, "-1 1"},
		{"clock", "date -s 2001-01-01 2>&1 >/dev/null; date +%Y | grep -vc 2001", "*1"},
		{"reboot", "reboot -f 2>&1; echo alive", "*alive"},
	} {
		r := n.do("exec", "box", "sh", "-c", c.command)
		got := strings.TrimSpace(r.out)
		if want, ok := strings.CutPrefix(c.want, "*"); ok {
			if !strings.Contains(strings.ToLower(got), want) {
				t.Errorf("%s: got %q, want %q in it (%s)", c.name, got, want, r.err)
			}
		} else if got != c.want {
			t.Errorf("%s: got %q, want %q (%s)", c.name, got, c.want, r.err)
		}
	}
}

func TestMemoryLimit(t *testing.T) {
	n := open(t)
	r := n.do("run", "--name", "greedy", "--tenant", "acme", "--memory", "48MiB", python, "python3", "-c", "x = []\nwhile True: x.append(bytearray(1 << 20))")
	x := n.get("greedy").Sandbox.Exit
	if r.code != 137 || !strings.Contains(x.Reason, "OOM") || !strings.Contains(x.Message, fmt.Sprint(48<<20)) {
		t.Errorf("exit %d, record %+v: %s", r.code, x, r)
	}
}

// TestOutOfMemoryEndsTheWholeSandbox: also when it was a child of the command
// that took the memory.
func TestOutOfMemoryEndsTheWholeSandbox(t *testing.T) {
	need.CgroupV2(t)
	n := open(t)
	r := n.do("run", "--name", "family", "--tenant", "acme", "--memory", "48MiB", python, "sh", "-c",
		"python3 -c 'x = bytearray(1 << 28)'; echo the command went on")
	if x := n.get("family").Sandbox.Exit; r.code != 137 || !strings.Contains(x.Reason, "OOM") || strings.Contains(r.out, "went on") {
		t.Errorf("exit %d, record %+v: %s", r.code, x, r)
	}
}

// TestForkBomb: it stays inside, and what is outside goes on.
func TestForkBomb(t *testing.T) {
	n := open(t)
	const bomb = `
import os, time
while True:
    try: os.fork()
    except OSError: time.sleep(0.01)
`
	n.must("run", "-d", "--name", "bomb", "--tenant", "acme", "--pids", "24", "--cpus", "500m", "--memory", "128MiB", python, "python3", "-c", bomb)
	classic := n.do("run", "--name", "classic", "--tenant", "acme", "--pids", "24", "--cpus", "500m", "--memory", "64MiB", busybox,
		"sh", "-c", "bomb() { bomb | bomb & }; bomb; sleep 1; echo over")
	if !strings.Contains(classic.err, "can't fork") && !strings.Contains(classic.out, "over") {
		t.Errorf("the shell's bomb: %s", classic)
	}
	time.Sleep(2 * time.Second)
	if r := n.do("run", "--rm", "--tenant", "globex", busybox, "echo", "fine"); r.out != "fine\n" {
		t.Errorf("a neighbour of the bomb: %s", r)
	}
	pid := n.get("bomb").Sandbox.Pid
	if pid == "0" || pid == "" {
		t.Fatalf("the bomb has ended: %+v", n.get("bomb").Sandbox.Exit)
	}
	out, err := exec.Command("sh", "-c", "grep -l "+n.get("bomb").Sandbox.ID+" /proc/[0-9]*/cgroup 2>/dev/null | wc -l").Output()
	if err != nil {
		t.Fatal(err)
	}
	if count := number(strings.TrimSpace(string(out))); count < 10 || count > 24 {
		t.Errorf("the bomb has %d processes, want up to its limit of 24", count)
	}
	began := time.Now()
	n.must("rm", "-f", "bomb")
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("its end took %s", d)
	}
}

func TestCPULimit(t *testing.T) {
	n := open(t)
	const burn = `
import os, time
end = time.monotonic() + 2
while time.monotonic() < end: pass
t = os.times()
print(t.user + t.system)
`
	// One process, and four at once: the limit is the sandbox's.
	out := n.must("run", "--rm", "--tenant", "acme", "--cpus", "200m", python, "python3", "-c", burn)
	var used float64
	if _, err := fmt.Sscan(out, &used); err != nil || used > 0.2*2+0.15 || used < 0.1 {
		t.Errorf("%q CPU seconds in 2 s at 0.2 cores", out)
	}
	out = n.must("run", "--rm", "--tenant", "acme", "--cpus", "200m", python, "sh", "-c",
		"for i in 1 2 3 4; do python3 -c '"+burn+"' & done; wait")
	var sum float64
	for _, f := range strings.Fields(out) {
		_, _ = fmt.Sscan(f, &used)
		sum += used
	}
	if sum > 0.2*4+0.3 {
		t.Errorf("four processes used %g CPU seconds at 0.2 cores", sum)
	}
}

func TestLifetime(t *testing.T) {
	n := open(t)
	began := time.Now()
	r := n.do("run", "--name", "brief", "--ttl", "1s", "--tenant", "acme", busybox, "sleep", "100")
	x := n.get("brief").Sandbox.Exit
	if d := time.Since(began); r.code != 137 || !strings.Contains(x.Reason, "TTL") || !strings.Contains(x.Message, "1s") || d > 6*time.Second {
		t.Errorf("exit %d after %s, record %+v", r.code, d, x)
	}
}
