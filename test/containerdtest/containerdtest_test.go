// SPDX-License-Identifier: Apache-2.0

package containerdtest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestStartRestartClose(t *testing.T) {
	d, err := Open(Config{BinDir: Need(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	first := d.Pid()
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := d.Up(); err != nil {
		t.Fatal(err)
	}
	if d.Pid() == first {
		t.Fatalf("pid is still %d", first)
	}
	if left := d.Leftovers(); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("directory still there: %v", err)
	}
	if pids := owned(d.Dir); len(pids) != 0 {
		t.Errorf("processes left: %v", pids)
	}
}

// TestSweep: what an instance that was killed has left is cleared by the next.
func TestSweep(t *testing.T) {
	d, err := Open(Config{BinDir: Need(t)})
	if err != nil {
		t.Fatal(err)
	}
	pid := d.Pid()
	// As if this process had died: the kernel drops its lock.
	d.lock.Close()
	d.lock = nil
	next, err := Open(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if _, err := os.Stat(filepath.Join(d.Dir, lockName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s not swept: %v", d.Dir, err)
	}
	if st, ok := readStat(pid); ok && st.state != 'Z' {
		t.Errorf("containerd %d runs on", pid)
	}
}
