// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

// runOut runs a spec to its end and answers what it wrote.
func runOut(t testing.TB, r *Runtime, s runtime.Spec) (exit runtime.Exit, stdout, stderr string) {
	t.Helper()
	task, err := r.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return finish(t, r, task, s)
}

// finish starts a task and does the rest of runOut.
func finish(t testing.TB, r *Runtime, task runtime.Task, s runtime.Spec) (exit runtime.Exit, stdout, stderr string) {
	t.Helper()
	if err := task.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	exit, err := task.Wait(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if err := logs.Copy(t.Context(), s.LogDir, logs.Options{}, &out, &errs); err != nil {
		t.Fatal(err)
	}
	return exit, out.String(), errs.String()
}

func runSh(t testing.TB, r *Runtime, script string) string {
	t.Helper()
	exit, out, errs := runOut(t, r, newSpec(t, r, "sh", "-c", script))
	if exit.Code != 0 {
		t.Errorf("exit %d: %s%s", exit.Code, out, errs)
	}
	return out
}

// procStatus reads fields of /proc/self/status.
func procStatus(text string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			out[k] = strings.TrimSpace(v)
		}
	}
	return out
}

func TestInsidePrivileges(t *testing.T) {
	r := start(t)
	// CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, KILL 5, SETGID 6, SETUID 7,
	// NET_BIND_SERVICE 10
	const root = "00000000000004fb"
	const none = "0000000000000000"
	for _, c := range []struct{ user, effective, permitted string }{
		{"", root, root}, {"agent", none, none}, {"1234:5678", none, none},
	} {
		s := newSpec(t, r, "cat", "/proc/self/status")
		s.User = c.user
		_, out, _ := runOut(t, r, s)
		st := procStatus(out)
		for k, want := range map[string]string{
			"CapInh": none, "CapPrm": c.permitted, "CapEff": c.effective, "CapBnd": root, "CapAmb": none,
			"NoNewPrivs": "1", "Seccomp": "2",
		} {
			if st[k] != want {
				t.Errorf("user %q: %s: got %s, want %s", c.user, k, st[k], want)
			}
		}
	}
}

func TestInsideUsers(t *testing.T) {
	r := start(t)
	for user, want := range map[string]string{
		"":           "uid=0(root) gid=0(root)",
		"agent":      "uid=1000(agent) gid=1000(agent) groups=2000(tools)",
		"1000":       "uid=1000(agent) gid=1000(agent) groups=2000(tools)",
		"1000:2000":  "uid=1000(agent) gid=2000(tools)",
		"4000:tools": "uid=4000 gid=2000(tools)",
	} {
		s := newSpec(t, r, "id")
		s.User = user
		_, out, errs := runOut(t, r, s)
		if !strings.HasPrefix(strings.TrimSpace(out), want) {
			t.Errorf("user %q: got %q%s, want %q", user, out, errs, want)
		}
	}
	s := newSpec(t, r, "id")
	s.User = "nobodyknows"
	if _, err := r.Create(t.Context(), s); err == nil || !strings.Contains(err.Error(), "nobodyknows") {
		t.Errorf("unknown user: got %v", err)
	}
	if ids, err := r.List(t.Context()); err != nil || slices.Contains(ids, s.ID) {
		t.Errorf("left over: %v, %v", ids, err)
	}
}

// TestInsideForbidden: each of these is refused to root in a sandbox.
// unshare -U is, too: the filter lets no process without SYS_ADMIN make
// namespaces, so that there is no user namespace in which a capability could
// be had back.
func TestInsideForbidden(t *testing.T) {
	r := start(t)
	out := runSh(t, r, `
try() { if "$@" 2>/dev/null >/dev/null; then echo "allowed: $*"; fi; }
try mknod /tmp/null c 1 3
try mknod /tmp/sda b 8 0
try mkfifo /dev/null/x
try mount -t tmpfs none /tmp
try mount -t proc none /tmp
try mount -o remount,rw /sys
try mount -o remount,rw /sys/fs/cgroup
try umount /proc/kcore
try unshare -U true
try unshare -m true
try unshare -n true
try nsenter -t 1 -m true
try chroot / true
try hostname other
try ip link add d type dummy
try ip link set lo down
try ping -c1 -W1 127.0.0.1
try sh -c "echo 1 > /proc/sys/kernel/panic"
try sh -c "echo b > /proc/sysrq-trigger"
try sh -c "echo +memory > /sys/fs/cgroup/cgroup.subtree_control"
try sh -c "cat /proc/kcore | head -c1 | grep ."
try sh -c "cat /proc/kmsg | head -c1 | grep ."
try cat /var/mem
try dd if=/var/mem of=/dev/null bs=1 count=1
try dmesg
try swapoff -a
try reboot -f
date -s 2020-01-01 >/dev/null 2>&1; try [ $(date +%Y) = 2020 ]
try nice -n -5 true
try sh -c "ulimit -c unlimited"
try sh -c "echo -1000 > /proc/self/oom_score_adj"
try cat /sys/devices/virtual/dmi/id/product_serial
echo done`)
	if out != "done\n" {
		t.Errorf("got:\n%s", out)
	}
}

// families are those of the sockets that a sandbox may have.
var families = []int{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_PACKET}

// TestInsideSockets: no socket but of families that tc sees, or that stay
// inside. For a family that it has not, the kernel says EAFNOSUPPORT; EPERM is
// the filter's word.
func TestInsideSockets(t *testing.T) {
	r := start(t)
	const no, yes = "1", "0"
	var calls []string
	want := map[string]string{
		"socket 2 1 6": yes, "socket 2 2 17": yes, "socket 10 1 0": yes, "socket 10 2 0": yes, "socket 1 1 0": yes, "socket 16 3 0": yes,
		"socket 2 1 256": no, "socket 10 1 256": no, // IPPROTO_SMC
		"socket 2 3 1": no, "socket 17 3 768": no, // raw and packet: the capability is what lacks
		"socketpair 1 1 0": yes,
		// More bits than an int has.
		"socket 4294967312 3 0": no, "socket 4294967317 5 0": no, "socket 2 1 4294967552": no, "socketpair 4294967326 1 0": no,
	}
	// All that there are, and some that may come: RDS is 21, IB 27, TIPC 30, ALG
	// 38, VSOCK 40, SMC 43, XDP 44.
	for family := range 64 {
		if !slices.Contains(families, family) {
			for kind := unix.SOCK_STREAM; kind <= unix.SOCK_SEQPACKET; kind++ {
				want[fmt.Sprintf("socket %d %d 0", family, kind)] = no
			}
		}
		if family != unix.AF_UNIX {
			want[fmt.Sprintf("socketpair %d 1 0", family)] = no
		}
	}
	for call := range want {
		calls = append(calls, call)
	}
	// Its own program: no image has one that asks for all of these.
	program := filepath.Join(t.TempDir(), "sockets")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "./testdata/sockets")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	body, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	s := newSpec(t, r, append([]string{"env", "/tmp/sockets"}, calls...)...)
	task, err := r.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/tmp/sockets", task.PID()), body, 0o755); err != nil {
		t.Fatal(err)
	}
	exit, out, errs := finish(t, r, task, s)
	if exit.Code != 0 {
		t.Errorf("exit %d: %s", exit.Code, errs)
	}
	got := map[string]string{}
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		at := max(strings.LastIndexByte(line, ' '), 0)
		got[line[:at]] = strings.TrimSpace(line[at:])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("errno of each (-want +got):\n%s", diff)
	}
}

// TestInsideAllowed: what ordinary images do goes on to work.
func TestInsideAllowed(t *testing.T) {
	r := start(t)
	out := runSh(t, r, `
set -e
touch /tmp/f; chown agent:tools /tmp/f; chmod 4755 /tmp/f
su agent -c id | grep -q uid=1000
sleep 100 & kill $!
cat /run/from-image
echo x > /dev/null; head -c 4 /dev/urandom | wc -c
nc -l -p 80 & sleep 0.1; kill $!
df -k /dev/shm | grep -q 65536`)
	if out != "yes\n4\n" {
		t.Errorf("got %q", out)
	}
}

func TestInsideDevices(t *testing.T) {
	r := start(t)
	out := runSh(t, r, `ls -1 /dev; echo --; find /dev -type c -o -type b | sort; echo --; cat /sys/fs/cgroup/devices/devices.list 2>/dev/null || true`)
	parts := strings.Split(out, "--\n")
	want := "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
	if got := strings.Join(strings.Fields(parts[0]), " "); got != want {
		t.Errorf("/dev: got %s, want %s", got, want)
	}
	want = "/dev/full /dev/null /dev/pts/ptmx /dev/random /dev/tty /dev/urandom /dev/zero"
	if got := strings.Join(strings.Fields(parts[1]), " "); got != want {
		t.Errorf("nodes: got %s, want %s", got, want)
	}
	// The wildcard mknod and the tun device (10:200) are runc's own and cannot be
	// taken back: without CAP_MKNOD there is no node for it to open. Nothing else
	// may be read or written.
	for line := range strings.Lines(parts[2]) {
		line = strings.TrimSpace(line)
		if !slices.Contains([]string{
			"c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm", "c 10:200 rwm",
		}, line) {
			t.Errorf("device rule %s", line)
		}
	}
}

func TestInsideNamespaces(t *testing.T) {
	r := start(t)
	s := newSpec(t, r, "sh", "-c", `
for n in cgroup ipc mnt net pid uts; do echo $n $(readlink /proc/self/ns/$n); done
echo pids $(ls /proc | grep -c '^[0-9]')
echo hostname $(hostname)
echo cgroups $(cut -d: -f3 /proc/self/cgroup | sort -u)
echo links $(ls /sys/class/net)
echo nofile $(ulimit -n) $(ulimit -Hn)
echo core $(ulimit -Hc)
echo score $(cat /proc/self/oom_score_adj)`)
	s.Hostname = "inside"
	_, out, _ := runOut(t, r, s)
	got := map[string]string{}
	for line := range strings.Lines(out) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), " ")
		got[k] = v
	}
	for _, n := range []string{"cgroup", "ipc", "mnt", "net", "pid", "uts"} {
		ours, err := os.Readlink("/proc/self/ns/" + n)
		if err != nil {
			t.Fatal(err)
		}
		if got[n] == ours || got[n] == "" {
			t.Errorf("%s namespace: got %s, ours is %s", n, got[n], ours)
		}
	}
	limits := readHostLimits()
	for k, want := range map[string]string{
		"hostname": "inside", "cgroups": "/", "links": "lo", "core": "0",
		"nofile": fmt.Sprintf("%d %d", min(softFiles, limits.hardFiles), limits.hardFiles),
		"score":  strconv.Itoa(limits.oomScore),
	} {
		if got[k] != want {
			t.Errorf("%s: got %q, want %q", k, got[k], want)
		}
	}
	// The shell, its substitution, ls and grep.
	if n, _ := strconv.Atoi(got["pids"]); n < 1 || n > 4 {
		t.Errorf("sees %s processes", got["pids"])
	}
}

// TestInsideNetns: the namespace that was given is the one that the command is
// in, already before it starts.
func TestInsideNetns(t *testing.T) {
	r := start(t)
	path := newNetns(t)
	want, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	s := newSpec(t, r, "sleep", "1000")
	s.NetnsPath = path
	task, err := r.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", task.PID()))
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(got, want) {
		t.Error("runc init waits in another network namespace")
	}
	s = newSpec(t, r, "true")
	s.NetnsPath = path + ".gone"
	if _, err := r.Create(t.Context(), s); err == nil {
		t.Error("a missing namespace is made up")
	}
}

// newNetns makes a network namespace that a file keeps.
func newNetns(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("bht%d-%s", os.Getpid(), filepath.Base(t.TempDir()))
	done := make(chan error, 1)
	go func() {
		// The thread is given up: it ends in the new namespace.
		lockThread()
		ns, err := netns.NewNamed(name)
		if err == nil {
			ns.Close()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.DeleteNamed(name); err != nil {
			t.Error(err)
		}
	})
	return "/run/netns/" + name
}

func TestInsideFiles(t *testing.T) {
	r := start(t)
	dir := t.TempDir()
	resolv, hosts := filepath.Join(dir, "resolv"), filepath.Join(dir, "hosts")
	for path, text := range map[string]string{resolv: "nameserver 169.254.1.1\n", hosts: "127.0.0.1 localhost\n"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := newSpec(t, r, "sh", "-c", "cat /etc/resolv.conf /etc/hosts; echo x 2>/dev/null >> /etc/resolv.conf || echo refused; rm -f /etc/hosts 2>/dev/null || echo refused")
	s.ResolvConf, s.Hosts = resolv, hosts
	_, out, _ := runOut(t, r, s)
	if diff := cmp.Diff("nameserver 169.254.1.1\n127.0.0.1 localhost\nrefused\nrefused\n", out); diff != "" {
		t.Error(diff)
	}
}
