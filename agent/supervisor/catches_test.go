// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// TestCatches: what has no handler for TERM is told from what has one, and what
// cannot be known counts as having one.
func TestCatches(t *testing.T) {
	deaf := exec.Command("sleep", "60")
	if err := deaf.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = deaf.Process.Kill(); _ = deaf.Wait() })
	// The child has our handlers until it is another program.
	for range 100 {
		if !catches(uint32(deaf.Process.Pid), syscall.SIGTERM) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if catches(uint32(deaf.Process.Pid), syscall.SIGTERM) {
		t.Error("sleep has a handler for TERM")
	}
	if !catches(uint32(os.Getpid()), syscall.SIGTERM) {
		t.Error("a Go program has no handler for TERM")
	}
	if !catches(0, syscall.SIGTERM) {
		t.Error("a process that is not there has no handler")
	}
}
