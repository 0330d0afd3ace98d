// SPDX-License-Identifier: Apache-2.0

package supervisor_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
)

// faults counts how often each point is reached and does something at one of
// them.
type faults struct {
	mu   sync.Mutex
	seen map[string]int
	hits int

	point string
	nth   int
	do    func() error
}

func (f *faults) fault(point string) error {
	f.mu.Lock()
	if f.seen == nil {
		f.seen = map[string]int{}
	}
	f.seen[point]++
	hit := point == f.point && f.seen[point] == f.nth
	if hit {
		f.hits++
	}
	f.mu.Unlock()
	if hit {
		return f.do()
	}
	return nil
}

// count answers how often it was done.
func (f *faults) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hits
}

// busy is how often a command of the life in these tests uses something. It
// shares no multiple with any interval of the supervisor below a minute.
const busy = 73 * time.Millisecond

// life is what every sandbox of these tests does: run for some samples, end
// with a code of its own.
func life() sandbox.Spec { return spec("life", "sleep 2.5; exit 3") }

// points answers every fault point of a whole life and how often it is reached.
func points(t *testing.T) map[string]int {
	t.Helper()
	var f faults
	var seen map[string]int
	inWorld(t, func(_ *testing.T, w *world) {
		w.m.SetBusy(busy)
		w.start(f.fault)
		rec := w.wait(w.create(life()).ID)
		if rec.Exit.Reason != sandbox.Exited || rec.Exit.Code != 3 {
			w.t.Errorf("exit: got %+v, want code 3", rec.Exit)
		}
		f.mu.Lock()
		seen = maps.Clone(f.seen)
		f.mu.Unlock()
		w.checkGone()
		if a := w.m.Account(rec.ID); a.EgressBytes == 0 || a.CPUNs == 0 {
			w.t.Errorf("the busy command used %+v", a)
		}
	})
	want := []string{"place", "start:recorded", "stopping", "usage", "stopped", "release", "usage:marked", "usage:spooled"}
	for _, step := range []string{"cgroup", "link", "egress", "names", "task", "start"} {
		want = append(want, step+":do", step+":done", step+":undo")
	}
	for _, p := range want {
		if seen[p] == 0 {
			t.Errorf("point %s is not reached by a whole life", p)
		}
	}
	return seen
}

// times answers which of n times a point is reached are worth a test.
func times(n int) []int {
	return slices.Compact([]int{1, min(n, 2), n})
}

var errInjected = errors.New("injected")

// launchPoint reports whether the launch has not let the command run yet.
func launchPoint(p string) bool {
	return p == "place" || strings.HasSuffix(p, ":do") || strings.HasSuffix(p, ":done") || p == "start:recorded"
}

func TestBrokenAtEveryPoint(t *testing.T) {
	for point, n := range points(t) {
		for _, nth := range times(n) {
			t.Run(fmt.Sprintf("%s/%d", point, nth), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.m.SetBusy(busy)
					f := faults{point: point, nth: nth, do: func() error { return errInjected }}
					w.start(f.fault)
					rec := w.wait(w.create(life()).ID)
					if f.count() != 1 {
						t.Fatalf("the point was reached %d times", f.count())
					}
					want, code, text := sandbox.Exited, 3, "code 3"
					if launchPoint(point) && nth == 1 {
						want, code, text = sandbox.LaunchFailed, -1, "injected"
					}
					if rec.Exit.Reason != want || rec.Exit.Code != code || !strings.Contains(rec.Exit.Message, text) {
						t.Errorf("exit: got %+v, want %s, code %d, with %q", *rec.Exit, want, code, text)
					}
					w.checkGone()
					w.restart()
					w.checkGone()
				})
			})
		}
	}
}

func TestKilledAtEveryPoint(t *testing.T) {
	for point, n := range points(t) {
		for _, nth := range times(n) {
			t.Run(fmt.Sprintf("%s/%d", point, nth), func(t *testing.T) {
				inWorld(t, func(t *testing.T, w *world) {
					w.m.SetBusy(busy)
					f := faults{point: point, nth: nth, do: w.die}
					w.start(f.fault)
					id := w.create(life()).ID
					w.killed()
					w.start(nil)
					rec := w.wait(id)
					checkTruth(t, w, rec)
					w.checkGone()
				})
			})
		}
	}
}

// checkTruth holds the exit record against what really happened.
func checkTruth(t *testing.T, w *world, rec sandbox.Record) {
	t.Helper()
	want, code := sandbox.Exited, 3
	if !w.m.Ran(rec.ID) {
		want, code = sandbox.LaunchFailed, -1
	}
	if rec.Exit == nil || rec.Exit.Reason != want || rec.Exit.Code != code {
		t.Errorf("exit: got %+v, want %s, code %d", rec.Exit, want, code)
	}
}

// TestKilledAgainAndAgain kills agents at their first point, later ones at
// their second, and so on: recovery, too, is broken off everywhere.
func TestKilledAgainAndAgain(t *testing.T) {
	for _, each := range []int{1, 2, 3, 5} { // so many agents for each depth
		t.Run(fmt.Sprint(each), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.m.SetBusy(busy)
				var id string
				lives := 0
				for n := 1; ; n = 1 + lives/each {
					var f countdown
					f.left, f.do = n, w.die
					w.start(f.fault)
					if id == "" {
						id = w.create(life()).ID
					}
					if dead := w.waitOrDie(id); !dead {
						break
					}
					lives++
					w.killed()
				}
				if lives < 3 {
					t.Errorf("only %d agents were killed", lives)
				}
				checkTruth(t, w, w.record(id))
				w.restart()
				w.checkGone()
			})
		})
	}
}

// countdown does something at the nth point, whichever it is.
type countdown struct {
	mu   sync.Mutex
	left int
	do   func() error
}

func (c *countdown) fault(string) error {
	c.mu.Lock()
	c.left--
	now := c.left == 0
	c.mu.Unlock()
	if now {
		return c.do()
	}
	return nil
}

// waitOrDie waits until a sandbox is stopped or the agent is dead.
func (w *world) waitOrDie(id string) (dead bool) {
	w.t.Helper()
	for range 10000 {
		if w.proc.Dead() {
			return true
		}
		if w.record(id).State == sandbox.Stopped {
			time.Sleep(time.Millisecond)
			return w.proc.Dead()
		}
		time.Sleep(3 * time.Millisecond)
	}
	w.t.Fatalf("%s is %s for ever", id, w.record(id).State)
	return false
}
