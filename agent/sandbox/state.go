// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"slices"
)

// State of a sandbox; see the package documentation.
type State string

// The states.
const (
	Admitted State = "admitted"
	Placed   State = "placed"
	Running  State = "running"
	Paused   State = "paused"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Lost     State = "lost"
)

// transitions is the whole table: from each state, where one may go.
var transitions = map[State][]State{
	Admitted: {Placed, Stopping},
	Placed:   {Running, Stopping},
	Running:  {Paused, Stopping},
	Paused:   {Running, Stopping},
	Stopping: {Stopped},
	Stopped:  {},
	Lost:     {},
}

// TransitionError says that a sandbox was asked to go where it cannot.
type TransitionError struct {
	ID       string
	From, To State
}

func (e *TransitionError) Error() string {
	return fmt.Sprintf("sandbox %s cannot go from %s to %s", e.ID, e.From, e.To)
}

// To moves the record to another state. The error is a *TransitionError, and
// the record is unchanged then.
func (r *Record) To(s State) error {
	if !slices.Contains(transitions[r.State], s) {
		return &TransitionError{ID: r.ID, From: r.State, To: s}
	}
	r.State = s
	return nil
}

// Live reports whether the sandbox holds anything: a slot, a share of its
// tenant's quota, something on the machine.
func (s State) Live() bool { return s != Stopped && s != Lost }

// Valid reports whether s is one of the states.
func (s State) Valid() bool {
	_, ok := transitions[s]
	return ok
}
