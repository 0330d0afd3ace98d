// SPDX-License-Identifier: Apache-2.0

package supervisor

import "github.com/bulkheadhq/bulkhead/agent/sandbox"

// Change is one step in the life of a sandbox.
type Change struct {
	Record  sandbox.Record
	Deleted bool
}

// Subscription receives changes. C is closed by the supervisor when the
// subscriber falls behind by its depth, so that a slow reader holds up nobody
// and knows that it missed something; Close ends it.
type Subscription struct {
	C      chan Change
	s      *Supervisor
	closed bool
}

// subscriptionDepth is enough for every sandbox of a node to change twice.
const subscriptionDepth = 8192

// Subscribe answers every record as it is now and a subscription to what
// changes from here on.
func (s *Supervisor) Subscribe() ([]sandbox.Record, *Subscription) {
	sub := &Subscription{C: make(chan Change, subscriptionDepth), s: s}
	s.watching.Lock()
	s.subs[sub] = struct{}{}
	s.watching.Unlock()
	return s.List(), sub
}

// Close ends the subscription.
func (sub *Subscription) Close() {
	sub.s.watching.Lock()
	defer sub.s.watching.Unlock()
	sub.s.drop(sub)
}

// drop ends a subscription once. The caller holds watching.
func (s *Supervisor) drop(sub *Subscription) {
	if !sub.closed {
		sub.closed = true
		close(sub.C)
		delete(s.subs, sub)
	}
}

func (s *Supervisor) publish(rec sandbox.Record, deleted bool) {
	s.watching.Lock()
	defer s.watching.Unlock()
	for sub := range s.subs {
		select {
		case sub.C <- Change{Record: rec, Deleted: deleted}:
		default:
			s.drop(sub)
		}
	}
}
