// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"hash/maphash"
	"sync"
	"time"
)

// bucket is a token bucket. The zero value is full.
type bucket struct {
	mu     sync.Mutex
	used   float64 // tokens taken and not yet given back by time
	stamp  time.Time
	silent uint64 // takes that failed since the last that did not
}

// take answers whether there was a token, and how often there was none before.
func (b *bucket) take(now time.Time, rate, burst float64) (ok bool, missed uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.stamp.IsZero() && now.After(b.stamp) {
		b.used = max(0, b.used-now.Sub(b.stamp).Seconds()*rate)
	}
	if b.stamp.IsZero() || now.After(b.stamp) {
		b.stamp = now
	}
	if b.used+1 > burst {
		b.silent++
		return false, b.silent
	}
	b.used++
	missed, b.silent = b.silent, 0
	return true, missed
}

var nameSeed = maphash.MakeSeed()

// distinct counts the different names of each rule in the running minute. The
// zero value is ready.
type distinct struct {
	mu     sync.Mutex
	minute time.Time
	seen   map[int]map[uint64]struct{}
}

// allow answers whether a name is one of the first most names under a rule in
// this minute.
func (d *distinct) allow(now time.Time, rule int, name string, most int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now.Sub(d.minute) >= time.Minute || now.Before(d.minute) {
		d.minute, d.seen = now, map[int]map[uint64]struct{}{}
	}
	set := d.seen[rule]
	if set == nil {
		set = map[uint64]struct{}{}
		d.seen[rule] = set
	}
	h := maphash.String(nameSeed, name)
	if _, ok := set[h]; ok {
		return true
	}
	if len(set) >= most {
		return false
	}
	set[h] = struct{}{}
	return true
}

// eventRate and eventBurst bound the events of a sandbox, those of released
// answers and the others each for themselves: a flood of refusals must not
// hide what was answered, nor the other way round.
const (
	eventRate  = 10
	eventBurst = 50
)

// emit hands an event on, unless there were too many. What is a fault of the
// node is logged as well. sb.mu is not held.
func (sb *sandbox) emit(ev Event) {
	b := &sb.eventsOther
	if ev.Outcome == OutcomeAnswered || ev.Outcome == OutcomeAudit {
		b = &sb.eventsReleased
	}
	ev.ID, ev.Time = sb.id, time.Now()
	ok, missed := b.take(ev.Time, eventRate, eventBurst)
	if !ok {
		sb.n.suppressed.Add(1)
		return
	}
	ev.Suppressed = missed
	switch ev.Outcome {
	case OutcomeLearn:
		sb.cfg.Log.Warn("answer not released", "sandbox", sb.id, "name", ev.Name, "err", ev.Detail)
	case OutcomeEvicted:
		sb.cfg.Log.Info("addresses give way to newer ones", "sandbox", sb.id, "name", ev.Name, "addrs", len(ev.Addrs))
	case OutcomePanic:
		sb.cfg.Log.Error("resolver stumbled over a message", "sandbox", sb.id, "panic", ev.Detail)
	}
	sb.cfg.Event(ev)
}
