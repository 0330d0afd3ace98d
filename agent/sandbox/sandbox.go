// SPDX-License-Identifier: Apache-2.0

// Package sandbox is the domain: what a sandbox is, the states that it goes
// through, and how it ended. It is pure: it reads no clock but the one that it
// is given and touches no machine.
//
//	Admitted -> Placed -> Running <-> Paused
//	   |          |          |
//	   +----------+----------+-> Stopping -> Stopped        Lost
//
// Admitted: intent on disk, nothing exists. Placed: resources named and
// reserved. Running: task started, egress enforced. Stopping: whatever exists
// is on its way out. Stopped: nothing left on the machine, final usage
// spooled, reason recorded. Lost: found after a restart, not provably ours.
//
// A Record is all that must survive a crash of the agent. The store keeps it
// as JSON, so a field is never renamed and never changes its meaning.
package sandbox

import (
	"crypto/rand"
	"encoding/base32"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// IDLen is the length of every sandbox id.
const IDLen = 12

var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// NewID answers a fresh id: 60 random bits as 12 characters of [a-z2-7]. With
// a million ids alive the chance of a collision is below one in a million; the
// store refuses it all the same.
func NewID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return idEncoding.EncodeToString(b[:])[:IDLen]
}

// ValidID reports whether s has the form of an id.
func ValidID(s string) bool {
	if len(s) != IDLen {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '2' || r > '7')
	}) < 0
}

// Limits of one sandbox. Zero means the node's default, until Resolve.
type Limits struct {
	CPUMillis   int64 `json:"cpu_millis"` // 1000 is one core
	MemoryBytes int64 `json:"memory_bytes"`
	PIDs        int64 `json:"pids"`
}

// Spec is what somebody asked for. It does not change after admission.
type Spec struct {
	Name         string            `json:"name"`
	Tenant       tenant.Path       `json:"tenant"`
	Image        string            `json:"image"`
	Command      []string          `json:"command,omitempty"`
	Env          []string          `json:"env,omitempty"`
	Workdir      string            `json:"workdir,omitempty"`
	User         string            `json:"user,omitempty"`
	Limits       Limits            `json:"limits"`
	Policy       string            `json:"policy,omitempty"` // YAML of the sandbox's own EgressPolicy
	TTL          time.Duration     `json:"ttl,omitempty"`
	Terminal     bool              `json:"terminal,omitempty"`
	Stdin        bool              `json:"stdin,omitempty"`
	AutoRemove   bool              `json:"auto_remove,omitempty"`
	WorkloadRef  string            `json:"workload_ref,omitempty"`
	RuntimeClass string            `json:"runtime_class,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	Publish      []Port            `json:"publish,omitempty"`
}

// Port is a port of the sandbox that the outside may connect to, through a
// port of the node.
type Port struct {
	Host    uint16       `json:"host"`
	Sandbox uint16       `json:"sandbox"`
	Proto   netpol.Proto `json:"proto"` // TCP or UDP
}

// String is the form that people write: 8080:80/tcp.
func (p Port) String() string { return fmt.Sprintf("%d:%d/%s", p.Host, p.Sandbox, p.Proto) }

// Plan is where a sandbox goes: every name and number that a launch step
// uses. It is decided once; recovery uses it and not today's configuration.
type Plan struct {
	Slot       uint32     `json:"slot"`
	Addr4      netip.Addr `json:"addr4"`
	Addr6      netip.Addr `json:"addr6"`
	MAC        string     `json:"mac"`
	MTU        int        `json:"mtu"`
	HostLink   string     `json:"host_link"`
	NetnsPath  string     `json:"netns_path"`
	CgroupPath string     `json:"cgroup_path"`
	LogDir     string     `json:"log_dir"`
}

// StopRequest is the first reason somebody or something had to end a sandbox.
// It is on disk before anything is killed, so that the exit record tells the
// truth after a crash too.
type StopRequest struct {
	Reason  ExitReason    `json:"reason"`
	By      string        `json:"by,omitempty"` // "uid:1000"
	Message string        `json:"message,omitempty"`
	Grace   time.Duration `json:"grace"` // between TERM and KILL; 0 kills at once
	At      time.Time     `json:"at"`
}

// Event is one thing that happened to a sandbox, for `bulkhead get`.
type Event struct {
	At      time.Time `json:"at"`
	Kind    string    `json:"kind"`
	Message string    `json:"message,omitempty"`
}

// maxEvents is how many events a Record keeps; the oldest go first.
const maxEvents = 64

// Record is a sandbox as the store keeps it.
type Record struct {
	ID           string        `json:"id"`
	Spec         Spec          `json:"spec"`
	State        State         `json:"state"`
	Slot         uint32        `json:"slot"` // claimed by the store at Reserve, freed at Release
	Plan         *Plan         `json:"plan,omitempty"`
	CreatedBy    string        `json:"created_by"`
	Created      time.Time     `json:"created"`
	Started      time.Time     `json:"started,omitzero"`
	StartedBoot  time.Duration `json:"started_boot,omitempty"` // the same moment by CLOCK_BOOTTIME
	ImageDigest  string        `json:"image_digest,omitempty"`
	PolicyRev    uint64        `json:"policy_rev"`    // from 1, grows with every change in force
	PolicyDigest [32]byte      `json:"policy_digest"` // of the program in force
	BootID       string        `json:"boot_id"`       // of the node when it was admitted
	Stop         *StopRequest  `json:"stop,omitempty"`
	Final        *meter.Sample `json:"final,omitempty"` // last reading, kept until its usage is spooled
	Exit         *Exit         `json:"exit,omitempty"`
	Events       []Event       `json:"events,omitempty"`
	NotEnforced  []string      `json:"not_enforced,omitempty"`
}

// Log appends an event and drops the oldest beyond what a Record keeps.
func (r *Record) Log(at time.Time, kind, format string, args ...any) {
	r.Events = append(r.Events, Event{At: at.UTC(), Kind: kind, Message: fmt.Sprintf(format, args...)})
	if n := len(r.Events) - maxEvents; n > 0 {
		r.Events = append([]Event(nil), r.Events[n:]...)
	}
}

// Clone answers a copy whose later changes nobody else sees.
func (r Record) Clone() Record {
	r.Events = append([]Event(nil), r.Events...)
	if r.Plan != nil {
		p := *r.Plan
		r.Plan = &p
	}
	if r.Stop != nil {
		s := *r.Stop
		r.Stop = &s
	}
	if r.Exit != nil {
		e := *r.Exit
		r.Exit = &e
	}
	return r
}
