// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/runtimetest"
	"github.com/bulkheadhq/bulkhead/test/containerdtest"
)

// node is a private containerd with a busybox image, shared by all tests of the
// package. Each test has its own Runtime on it.
var node struct {
	daemon *containerdtest.Daemon
	logger string
	ids    int
}

// idleEnv makes this program do nothing until it is killed.
const idleEnv = "BULKHEAD_TEST_IDLE"

func TestMain(m *testing.M) {
	if os.Getenv(idleEnv) != "" {
		time.Sleep(time.Hour)
		os.Exit(1)
	}
	code := m.Run()
	if node.daemon != nil {
		if left := node.daemon.Leftovers(); len(left) > 0 {
			fmt.Fprintln(os.Stderr, "left over:", left)
			fmt.Fprintln(os.Stderr, node.daemon.LogTail(16<<10))
			code = 1
		}
		dir := node.daemon.Dir
		if err := node.daemon.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "close containerd:", err)
			code = 1
		}
		if _, err := os.Stat(dir); err == nil {
			fmt.Fprintln(os.Stderr, "left over:", dir)
			code = 1
		}
	}
	os.Exit(code)
}

// daemon starts the shared containerd.
func daemon(t testing.TB) *containerdtest.Daemon {
	t.Helper()
	bin := containerdtest.Need(t)
	if node.daemon != nil {
		return node.daemon
	}
	d, err := containerdtest.Open(containerdtest.Config{BinDir: bin})
	if err != nil {
		t.Fatal(err)
	}
	node.daemon = d
	node.logger = filepath.Join(d.Dir, "bulkhead-log")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", node.logger, "github.com/bulkheadhq/bulkhead/cmd/bulkhead-log")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build bulkhead-log: %v\n%s", err, out)
	}
	r := openRuntime(t)
	defer r.Close()
	if _, err := r.Import(t.Context(), bytes.NewReader(runtimetest.BusyboxArchive(t))); err != nil {
		t.Fatal(err)
	}
	return d
}

// openRuntime opens a Runtime as a restarted agent would.
func openRuntime(t testing.TB) *Runtime {
	t.Helper()
	d := node.daemon
	r, err := Open(Config{
		Address:  d.Address,
		Dir:      filepath.Join(d.Dir, "io"),
		Logger:   node.logger,
		Runc:     filepath.Join(d.BinDir, "runc"),
		RuncRoot: d.RuncRoot,
		Log:      slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// start opens a Runtime for one test.
func start(t testing.TB) *Runtime {
	t.Helper()
	daemon(t)
	r := openRuntime(t)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return r
}

// newSpec answers a spec of the busybox image with its own id; the test's end
// removes it.
func newSpec(t testing.TB, r *Runtime, command ...string) runtime.Spec {
	t.Helper()
	node.ids++
	id := fmt.Sprintf("t%d-%d", os.Getpid(), node.ids)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.Remove(ctx, id); err != nil {
			t.Errorf("remove: %v", err)
		}
		removeCgroup(t, id)
	})
	return runtime.Spec{
		ID:         id,
		Image:      runtimetest.BusyboxRef,
		Command:    command,
		CgroupPath: node.daemon.CgroupParent + "/" + id,
		LogDir:     filepath.Join(node.daemon.Dir, "logs", id),
	}
}

func removeCgroup(t testing.TB, id string) {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		dirs, _ := filepath.Glob(pattern + node.daemon.CgroupParent + "/" + id)
		for _, d := range dirs {
			t.Errorf("cgroup left over: %s", d)
			_ = os.Remove(d)
		}
	}
}
