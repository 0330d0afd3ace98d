// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// On a full disk a reservation is an error and nothing of it is there; with
// room again the same file goes on.
func TestDiskFull(t *testing.T) {
	need.Root(t)
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=512k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(mnt, "db")
	s := open(t, path)
	ballast := filepath.Join(mnt, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 200<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	n := 0
	name := func(i int) string { return fmt.Sprintf("name-%d", i) }
	id := func(i int) string {
		return fmt.Sprintf("aaaaaaaa%c%c%c%c", 'a'+i/26/26/26%26, 'a'+i/26/26%26, 'a'+i/26%26, 'a'+i%26)
	}
	for {
		r, err := s.Reserve(rec(id(n), name(n)), 1<<20, nil)
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if r.Slot != uint32(n+1) {
			t.Fatalf("slot %d, want %d", r.Slot, n+1)
		}
		if n++; n > 5000 {
			t.Fatal("the disk does not get full")
		}
	}
	check := func(want int) {
		t.Helper()
		recs, err := s.Load()
		if err != nil || len(recs) != want {
			t.Fatalf("%d records, %v; want %d", len(recs), err, want)
		}
	}
	check(n)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	check(n)
	for range 50 {
		r, err := s.Reserve(rec(id(n), name(n)), 1<<20, nil)
		if err != nil {
			t.Fatal(err)
		}
		if r.Slot != uint32(n+1) {
			t.Fatalf("slot %d, want %d: the refused reservation kept one", r.Slot, n+1)
		}
		n++
	}
	check(n)
}
