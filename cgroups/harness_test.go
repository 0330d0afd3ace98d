// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// envJob names what a copy of the test binary does inside a cgroup.
const envJob = "BULKHEAD_CGROUPS_TEST_JOB"

func TestMain(m *testing.M) {
	if job := os.Getenv(envJob); job != "" {
		runJob(job)
	}
	os.Exit(m.Run())
}

// runJob waits for a line, so that the test can move the process first.
func runJob(job string) {
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		os.Exit(3)
	}
	switch job {
	case "sleep":
		time.Sleep(time.Minute)
	case "spin":
		for n := 0; ; n++ {
			spun.Store(int64(n))
		}
	case "eat": // more memory than any test allows
		var all [][]byte
		for range 64 {
			b := make([]byte, 4<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			all = append(all, b)
		}
		fmt.Println(len(all))
	case "fork": // forks until told no more
		for range 50 {
			if err := exec.Command("/bin/sleep", "60").Start(); err != nil {
				if errors.Is(err, unix.EAGAIN) {
					os.Exit(11)
				}
				os.Exit(4)
			}
		}
		time.Sleep(time.Minute)
	}
	os.Exit(0)
}

// spun gives the spinning job something to do.
var spun atomic.Int64

var sliceNumber atomic.Int32

// open answers a tree with a slice of its own, on whatever this host has.
func open(t testing.TB) *Tree {
	t.Helper()
	need.Root(t)
	return openAt(t, Config{AllowPartial: true})
}

func openAt(t testing.TB, cfg Config) *Tree {
	t.Helper()
	if cfg.Slice == "" {
		cfg.Slice = fmt.Sprintf("bulkhead-test-%d-%d.slice", os.Getpid(), sliceNumber.Add(1))
	}
	tree, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { clean(t, tree) })
	return tree
}

// clean removes everything below the slice and checks that nothing is left.
func clean(t testing.TB, tree *Tree) {
	t.Helper()
	leaves, err := tree.List()
	if err != nil {
		t.Error(err)
	}
	for _, l := range leaves {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		err := errors.Join(tree.Kill(l.Tenant, l.ID), tree.WaitEmpty(ctx, l.Tenant, l.ID), tree.Remove(l.Tenant, l.ID))
		cancel()
		if err != nil {
			t.Error(err)
		}
	}
	if err := tree.Purge(); err != nil {
		t.Error(err)
	}
	for _, dir := range tree.hierarchies {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s is left", dir)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// makeLeaf does what the runtime does: the leaf in every hierarchy, and its
// parents where they lack.
func makeLeaf(t testing.TB, tree *Tree, tenant, id string) {
	t.Helper()
	dir, err := leafDir(tenant, id)
	must(t, err)
	if _, err := os.Stat(filepath.Dir(filepath.Join(tree.v2, dir))); err != nil {
		must(t, tree.Ensure(tenant, Limits{}))
	}
	for _, root := range tree.hierarchies {
		path := root
		must(t, makeDir(path))
		initCpuset(t, root, path)
		for s := range strings.SplitSeq(dir, "/") {
			path = filepath.Join(path, s)
			must(t, makeDir(path))
			initCpuset(t, root, path)
		}
	}
}

// initCpuset: a v1 cpuset takes no process before it has CPUs and memory.
func initCpuset(t testing.TB, root, path string) {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := readText(filepath.Join(path, file))
		if err != nil || have != "" {
			continue
		}
		for dir := filepath.Dir(path); len(dir) >= len(filepath.Dir(root)); dir = filepath.Dir(dir) {
			if v, err := readText(filepath.Join(dir, file)); err == nil && v != "" {
				if dir != filepath.Dir(path) { // fill the ones between first
					initCpuset(t, root, filepath.Dir(path))
				}
				must(t, writeFile(filepath.Join(path, file), v))
				break
			}
		}
	}
}

// job is a process in a leaf.
type job struct {
	cmd   *exec.Cmd
	stdin io.Closer
	done  chan error // gets the exit once
}

// start runs a job in a leaf of every hierarchy, or of those that only says.
func start(t testing.TB, tree *Tree, tenant, id, name string, only func(root string) bool) *job {
	t.Helper()
	makeLeaf(t, tree, tenant, id)
	dir, err := leafDir(tenant, id)
	must(t, err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envJob+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	j := &job{cmd: cmd, stdin: in, done: make(chan error, 1)}
	go func() { j.done <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = in.Close()
	})
	for _, root := range tree.hierarchies {
		if only == nil || only(root) {
			must(t, writeFile(filepath.Join(root, dir, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid)))
		}
	}
	_, err = io.WriteString(in, "go\n")
	must(t, err)
	return j
}

func (j *job) wait(t testing.TB) error {
	t.Helper()
	select {
	case err := <-j.done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("the job does not end")
		return nil
	}
}

// signalled reports the signal that ended a job.
func signalled(err error) unix.Signal {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.Sys().(syscall.WaitStatus).Signal()
	}
	return -1
}

// fileOf answers the text of a control file of a path below the slice, on
// the hierarchy where its controller is.
func fileOf(t testing.TB, tree *Tree, controller, dir, v2, v1 string) string {
	t.Helper()
	path := filepath.Join(tree.v2, dir, v2)
	if !tree.onV2(controller) {
		root, ok := tree.onV1(controller)
		if !ok {
			t.Skipf("this host has no %s controller", controller)
		}
		path = filepath.Join(root, dir, v1)
	}
	s, err := readText(path)
	must(t, err)
	return s
}
