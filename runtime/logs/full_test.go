// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// TestDiskFull: on a full disk output is dropped and counted, lines stay whole,
// and the loss is told once there is room.
func TestDiskFull(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	w := OpenWriter(Config{Dir: filepath.Join(dir, "logs"), MaxBytes: 1 << 20, Files: 2})
	defer w.Close()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	fill(w, 0, 2000)
	lost := w.Lost()
	if lost.Lines == 0 || lost.Bytes == 0 || lost.Err == nil {
		t.Fatalf("nothing lost: %+v", lost)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	w.Write(Stdout, []byte("room again\n"))
	var notices []string
	whole := 0
	err := Read(t.Context(), filepath.Join(dir, "logs"), Options{}, func(l Line) error {
		if l.Notice {
			notices = append(notices, string(l.Text))
		} else {
			whole++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(notices) != 1 || !strings.Contains(notices[0], "no space left") || strings.Contains(notices[0], dir) {
		t.Errorf("notices: got %q", notices)
	}
	if want := 2000 - int(lost.Lines) + 1; whole != want {
		t.Errorf("lines: got %d, want %d", whole, want)
	}
}

// TestDirectoryCannotBeMade: the writer goes on without, and begins when it can.
func TestDirectoryCannotBeMade(t *testing.T) {
	blocked := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(blocked, "logs")
	w := OpenWriter(Config{Dir: dir})
	defer w.Close()
	w.Write(Stdout, []byte("lost\n"))
	if got := w.Lost(); got.Lines != 1 || got.Err == nil {
		t.Errorf("lost: got %+v, want one line", got)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	w.Write(Stdout, []byte("kept\n"))
	if got := text(t, dir, Options{Stream: Stdout}); got != "kept\n" {
		t.Errorf("got %q", got)
	}
	if got := text(t, dir, Options{Stream: Stderr}); !strings.HasPrefix(got, "bulkhead-log: dropped 1 log lines") {
		t.Errorf("got %q", got)
	}
}
