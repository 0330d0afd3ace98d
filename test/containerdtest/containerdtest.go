// SPDX-License-Identifier: Apache-2.0

// Package containerdtest runs a private containerd: its own root, state, socket
// and runc state under one temporary directory, nothing shared with the
// machine's own containerd.
//
// Tests call Need first. Close ends every process, mount and cgroup that came of
// what Open started. A process that was killed before
// it could close leaves a directory whose lock nobody holds; the next Open on
// the machine clears it, by the process ids written in it.
//
// The programs are taken from BULKHEAD_BIN, or else from build/bin of the
// repository.
package containerdtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/test/need"
	"golang.org/x/sys/unix"
)

// programs that a private containerd cannot do without.
var programs = []string{"containerd", "containerd-shim-runc-v2", "runc"}

// dirPrefix of every instance's directory. The rest keeps unix socket paths
// short.
const dirPrefix = "bh-ctd-"

// startLimit and stopLimit are generous: under emulation everything is slow.
const (
	startLimit = 90 * time.Second
	stopLimit  = 30 * time.Second
)

// Need skips the test, or fails it under CI, unless this process is root and
// the programs are built. It answers their directory.
func Need(t testing.TB) string {
	t.Helper()
	need.Root(t)
	dir, err := BinDir()
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("needs containerd and runc (CI=true: a skip is a failure): %v", err)
		}
		t.Skipf("needs containerd and runc: %v", err)
	}
	return dir
}

// BinDir answers the directory that holds containerd, its runc shim and runc.
func BinDir() (string, error) {
	dir := os.Getenv("BULKHEAD_BIN")
	if dir == "" {
		root, err := RepoRoot()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(root, "build", "bin")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for _, p := range programs {
		if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
			return "", fmt.Errorf("%w (make setup builds it)", err)
		}
	}
	return dir, nil
}

// RepoRoot answers the directory of go.mod above the working directory.
func RepoRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = parent
	}
}

// Config of a private containerd. The zero value is a good one.
type Config struct {
	BinDir string // empty: BinDir()
	// NoSync leaves out fsync of containerd's database: for tests that make
	// hundreds of containers and measure none.
	NoSync bool
}

// Daemon is a running private containerd. Its methods are not for several
// goroutines at once.
type Daemon struct {
	Dir      string // everything is below it
	Address  string // of the gRPC socket
	RuncRoot string // for the runtime's own state
	BinDir   string
	// CgroupParent is a name no other instance has. Close removes the cgroups
	// below it from every hierarchy. Give it to specs as the first part of the
	// cgroup path.
	CgroupParent string

	lock *os.File // flock: this instance is alive
	cmd  *exec.Cmd
	dead chan struct{} // closed by the waiter when the process has ended
	log  string
}

var instances atomic.Int64

// Open runs a private containerd and waits until it answers.
func Open(cfg Config) (*Daemon, error) {
	if cfg.BinDir == "" {
		dir, err := BinDir()
		if err != nil {
			return nil, err
		}
		cfg.BinDir = dir
	}
	sweep()
	dir, err := os.MkdirTemp("", dirPrefix)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	d := &Daemon{
		Dir:          dir,
		Address:      filepath.Join(dir, "c.sock"),
		RuncRoot:     filepath.Join(dir, "runc"),
		BinDir:       cfg.BinDir,
		CgroupParent: fmt.Sprintf("bhtest-%d-%d", os.Getpid(), instances.Add(1)),
		log:          filepath.Join(dir, "containerd.log"),
	}
	if err := d.prepare(cfg); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if err := d.Up(); err != nil {
		return nil, errors.Join(err, fmt.Errorf("containerd said:\n%s", d.LogTail(4<<10)), d.Close())
	}
	return d, nil
}

func (d *Daemon) prepare(cfg Config) error {
	lock, err := os.OpenFile(filepath.Join(d.Dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	d.lock = lock
	// Another process's sweep may look at it just now.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if err := os.WriteFile(filepath.Join(d.Dir, cgroupName), []byte(d.CgroupParent), 0o600); err != nil {
		return err
	}
	conf := fmt.Sprintf(`version = 4
root = %[1]q
state = %[2]q
imports = []
oom_score = 0
disabled_plugins = [
  "io.containerd.nri.v1.nri",
  "io.containerd.internal.v1.restart",
  "io.containerd.monitor.container.v1.restart",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.zfs",
]

[plugins."io.containerd.server.v1.grpc"]
  address = %[3]q
[plugins."io.containerd.server.v1.ttrpc"]
  address = %[4]q
[plugins."io.containerd.server.v1.debug"]
  address = ""
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = %[5]q
[plugins."io.containerd.metadata.v1.bolt"]
  no_sync = %[6]t
[plugins."io.containerd.internal.v1.opt"]
  path = %[7]q
[plugins."io.containerd.image-verifier.v1.bindir"]
  bin_dir = %[7]q

[timeouts]
  "io.containerd.timeout.shim.load" = "60s"
  "io.containerd.timeout.task.state" = "30s"
`, filepath.Join(d.Dir, "root"), filepath.Join(d.Dir, "state"), d.Address, d.Address+".ttrpc",
		filepath.Join(d.Dir, "s"), cfg.NoSync, filepath.Join(d.Dir, "opt"))
	return os.WriteFile(filepath.Join(d.Dir, "config.toml"), []byte(conf), 0o600)
}

// Up starts the daemon again after Down or Kill, on the same directory.
func (d *Daemon) Up() error {
	logFile, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command(filepath.Join(d.BinDir, "containerd"), "--config", filepath.Join(d.Dir, "config.toml"))
	cmd.Env = append(os.Environ(), "PATH="+d.BinDir+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Dir = d.Dir
	// A group of its own: an interrupt on the terminal is for the test, which
	// then closes us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	dead := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(dead)
	}()
	d.cmd, d.dead = cmd, dead
	return d.waitUp()
}

// waitUp waits until the socket takes connections: containerd listens only when
// every plugin is ready.
func (d *Daemon) waitUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", d.Address)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-d.dead:
			return errors.New("containerd ended while starting")
		case <-ctx.Done():
			return fmt.Errorf("containerd does not answer: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Pid of the daemon.
func (d *Daemon) Pid() int { return d.cmd.Process.Pid }

// Kill ends the daemon at once. Shims and tasks run on.
func (d *Daemon) Kill() error { return d.end(syscall.SIGKILL) }

// Down asks the daemon to end and waits for it. Shims and tasks run on.
func (d *Daemon) Down() error { return d.end(syscall.SIGTERM) }

func (d *Daemon) end(sig syscall.Signal) error {
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal containerd: %w", err)
	}
	select {
	case <-d.dead:
	case <-time.After(stopLimit):
		return errors.New("containerd does not end")
	}
	d.cmd = nil
	return os.Remove(d.Address) // so that waitUp cannot meet the old one
}

// ShimPids answers the shims of one task, or of all with an empty id.
func (d *Daemon) ShimPids(id string) []int { return shims(d.Dir, id) }

// Leftovers names what is left of the tasks of this instance while the daemon
// still runs: shims, processes below them, mounts, cgroups. Tests call it after
// they have removed everything.
func (d *Daemon) Leftovers() []string {
	var left []string
	for _, pid := range shims(d.Dir, "") {
		left = append(left, "shim "+strconv.Itoa(pid))
	}
	for _, m := range mountsBelow(d.Dir) {
		left = append(left, "mount "+m)
	}
	for _, c := range cgroupDirs(d.CgroupParent) {
		if sub, err := os.ReadDir(c); err == nil {
			for _, e := range sub {
				if e.IsDir() {
					left = append(left, "cgroup "+filepath.Join(c, e.Name()))
				}
			}
		}
	}
	bundles, _ := filepath.Glob(filepath.Join(d.Dir, "state", "io.containerd.runtime.v2.task", "*", "*"))
	for _, b := range bundles {
		left = append(left, "bundle "+b)
	}
	states, _ := filepath.Glob(filepath.Join(d.RuncRoot, "*", "*"))
	for _, s := range states {
		left = append(left, "runc state "+s)
	}
	return left
}

// LogTail answers the last n bytes of the daemon's log.
func (d *Daemon) LogTail(n int) string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return strings.TrimSpace(string(b))
}

// Close ends everything that runs below Dir and removes it.
func (d *Daemon) Close() error {
	err := d.end(syscall.SIGKILL)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	err = errors.Join(err, clear(d.Dir, d.CgroupParent))
	if d.lock != nil {
		d.lock.Close()
		d.lock = nil
	}
	return err
}
