// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
	"github.com/bulkheadhq/bulkhead/test/need"
)

// A full disk refuses batches, keeps what was acknowledged, and heals when there
// is space again, without a restart and with one.
func TestFullDisk(t *testing.T) {
	need.Root(t)
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) { fullDisk(t, restart) })
	}
}

func fullDisk(t *testing.T, restart bool) {
	dir := t.TempDir()
	if err := unix.Mount("bulkhead-test", dir, "tmpfs", 0, "size=6m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	l := open(t, dir)
	t.Cleanup(func() { l.Close() })
	n := gatewaytest.NewNode("n1", 1)
	acked, refusals := 0, 0
	for refusals < 5 {
		if len(n.Sent) == acked {
			n.Batch(50)
		}
		if len(n.Sent) > 100_000 {
			t.Fatal("the disk never filled up")
		}
		mark, err := l.Append(t.Context(), "n1", n.Sent[acked:])
		switch {
		case err == nil:
			acked = int(mark.Seq)
		case errors.Is(err, ErrFull):
			refusals++
		default:
			t.Fatalf("got %v, want ErrFull", err)
		}
	}
	if acked == 0 {
		t.Fatal("got nothing onto the disk")
	}
	if got, err := l.Verify(t.Context(), "n1"); err != nil || got != uint64(acked) {
		t.Errorf("on the full disk: got %d, %v, want %d", got, err, acked)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if restart {
		l.Close()
		l = open(t, dir)
	}
	if got := appendOK(t, l, "n1", n.Sent[acked:]); got.Seq != uint64(len(n.Sent)) {
		t.Errorf("got watermark %d, want %d", got.Seq, len(n.Sent))
	}
	want := gatewaytest.Sum(false, matches(Filter{}), n.Sent)
	if diff := cmp.Diff(want, totals(t, l.Reader, Filter{}, false), bigInts); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Twenty nodes at once, each resending some of what it sent, while others read.
func TestConcurrentNodes(t *testing.T) {
	l := open(t, t.TempDir())
	nodes := make([]*gatewaytest.Node, 20)
	sent := make([][]*usagev1.Record, len(nodes))
	for i := range nodes {
		nodes[i] = gatewaytest.NewNode(fmt.Sprintf("node-%d", i), uint64(i))
		sent[i] = nodes[i].Batch(400)
	}
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			for at := 0; at < len(n.Sent); at += 20 {
				from := max(0, at-10)
				mark, err := l.Append(t.Context(), n.ID, n.Sent[from:at+20])
				if err != nil || mark.Seq != uint64(at+20) {
					t.Errorf("%s: got %d, %v, want %d", n.ID, mark.Seq, err, at+20)
					return
				}
			}
		})
	}
	for range 2 {
		wg.Go(func() {
			for range 10 {
				if _, err := l.Usage(t.Context(), Filter{Tenant: "acme"}, true); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	want := gatewaytest.Sum(true, matches(Filter{}), sent...)
	if diff := cmp.Diff(want, totals(t, l.Reader, Filter{}, true), bigInts); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

var update = flag.Bool("update", false, "write the fixture of the newest schema")

// Every released schema opens, migrates, verifies and takes more records.
func TestReleasedSchemas(t *testing.T) {
	newNode := func() *gatewaytest.Node {
		n := gatewaytest.NewNode("n1", 42)
		n.Batch(30)
		return n
	}
	if *update {
		dir := t.TempDir()
		l := open(t, dir)
		appendOK(t, l, "n1", newNode().Sent)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		copyFile(t, filepath.Join(dir, fileName), fmt.Sprintf("testdata/schema-%d.db", len(migrations)))
	}
	for v := 1; v <= len(migrations); v++ {
		dir := t.TempDir()
		copyFile(t, fmt.Sprintf("testdata/schema-%d.db", v), filepath.Join(dir, fileName))
		l := open(t, dir)
		if got, err := l.Verify(t.Context(), "n1"); err != nil || got != 30 {
			t.Errorf("schema %d: verify: got %d, %v, want 30", v, got, err)
		}
		n := newNode()
		n.Batch(5)
		if got := appendOK(t, l, "n1", n.Sent); got.Seq != 35 {
			t.Errorf("schema %d: got watermark %d, want 35", v, got.Seq)
		}
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
}
