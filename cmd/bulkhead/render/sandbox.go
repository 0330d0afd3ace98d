// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

// SandboxHeader heads the rows of SandboxRow.
var SandboxHeader = []string{"ID", "NAME", "TENANT", "IMAGE", "STATE", "CPU", "MEMORY", "PORTS", "CREATED"}

// SandboxRow is one line of ls.
func SandboxRow(s *sandboxv1.Sandbox) []string {
	spec, limits := s.GetSpec(), s.GetSpec().GetLimits()
	return []string{s.GetId(), spec.GetName(), spec.GetTenant(), spec.GetImage(), State(s),
		orNone(limits.GetCpuMillis(), CPU), orNone(limits.GetMemoryBytes(), Size[int64]), Published(spec.GetPublish()), Time(s.GetCreatedNs())}
}

func orNone(n int64, format func(int64) string) string {
	if n == 0 {
		return None
	}
	return format(n)
}

// State is the state in a word or two, with why it ended or what is wrong.
func State(s *sandboxv1.Sandbox) string {
	word := strings.ToLower(strings.TrimPrefix(s.GetState().String(), "STATE_"))
	e := s.GetExit()
	if e == nil || s.GetState() != sandboxv1.State_STATE_STOPPED {
		if odd := oddities(s); len(odd) > 0 {
			word += " (" + strings.Join(odd, ", ") + ")"
		}
		return word
	}
	switch e.GetReason() {
	case sandboxv1.ExitReason_EXIT_REASON_EXITED:
		return fmt.Sprintf("%s (exit %d)", word, e.GetCode())
	case sandboxv1.ExitReason_EXIT_REASON_SIGNALED:
		return fmt.Sprintf("%s (%s)", word, signalName(e.GetSignal()))
	case sandboxv1.ExitReason_EXIT_REASON_OOM:
		return word + " (out of memory)"
	case sandboxv1.ExitReason_EXIT_REASON_TTL:
		return word + " (lifetime over)"
	case sandboxv1.ExitReason_EXIT_REASON_STOPPED:
		return word + " (by " + orUnknown(e.GetBy()) + ")"
	case sandboxv1.ExitReason_EXIT_REASON_LAUNCH_FAILED:
		return word + " (did not start)"
	case sandboxv1.ExitReason_EXIT_REASON_LOST:
		return word + " (lost)"
	}
	return word
}

// oddities says in a few words what is out of the ordinary with its egress.
func oddities(s *sandboxv1.Sandbox) []string {
	var out []string
	if s.GetDegraded() != "" {
		out = append(out, "NOT ENFORCED")
	}
	if len(s.GetBlocked()) > 0 {
		out = append(out, "budget spent")
	}
	if s.GetAudit() {
		out = append(out, "audit")
	}
	return out
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

func signalName(n int32) string {
	if name := unix.SignalName(unix.Signal(n)); name != "" {
		return name
	}
	return "signal " + strconv.Itoa(int(n))
}

// Ending says in one sentence how a sandbox ended, and is empty if its command
// simply exited.
func Ending(s *sandboxv1.Sandbox) string {
	e, spec := s.GetExit(), s.GetSpec()
	switch e.GetReason() {
	case sandboxv1.ExitReason_EXIT_REASON_EXITED:
		return ""
	case sandboxv1.ExitReason_EXIT_REASON_SIGNALED:
		return "killed by " + signalName(e.GetSignal())
	case sandboxv1.ExitReason_EXIT_REASON_OOM:
		if m := spec.GetLimits().GetMemoryBytes(); m > 0 {
			return "killed: out of memory at " + Size(m) + " (limit of the sandbox)"
		}
		return "killed: out of memory"
	case sandboxv1.ExitReason_EXIT_REASON_TTL:
		if spec.GetTtlMs() > 0 {
			return "killed: its lifetime of " + Duration(spec.GetTtlMs()) + " is over"
		}
		return "killed: its lifetime is over"
	case sandboxv1.ExitReason_EXIT_REASON_STOPPED:
		return "stopped by " + Clean(orUnknown(e.GetBy()))
	case sandboxv1.ExitReason_EXIT_REASON_LAUNCH_FAILED:
		return strings.TrimSuffix("did not start: "+Clean(e.GetMessage()), ": ")
	case sandboxv1.ExitReason_EXIT_REASON_LOST:
		return strings.TrimSuffix("lost by the machine: "+Clean(e.GetMessage()), ": ")
	}
	return "ended, and the node does not know why"
}

// Report writes everything that is known about one sandbox.
func Report(w io.Writer, r *nodev1.GetResponse) error {
	p := &page{w: w}
	s := r.GetSandbox()
	p.pairs(summary(s))
	p.list("Not enforced here", s.GetNotEnforced())
	if n := r.GetNetwork(); n != nil {
		p.table("Network since start", []string{"DIRECTION", "BYTES", "PACKETS", "WIRE BYTES"}, [][]string{
			{"out (billed)", bytesCell(n.GetEgressBytes()), count(n.GetEgressPackets()), bytesCell(n.GetEgressWireBytes())},
			{"in", bytesCell(n.GetIngressBytes()), count(n.GetIngressPackets()), bytesCell(n.GetIngressWireBytes())},
			{"dropped", bytesCell(n.GetDroppedBytes()), count(n.GetDroppedPackets()), None},
		})
	} else if s.GetExit() != nil {
		p.line("\nNetwork: gone with the sandbox; what it used is in bulkhead usage --sandbox " + s.GetId())
	} else {
		p.line("\nNetwork: none yet")
	}
	var rows [][]string
	for _, c := range r.GetRules() {
		rows = append(rows, []string{c.GetTenant(), c.GetRule(), count(c.GetPackets()), bytesCell(c.GetBytes()), Time(c.GetLastEventNs())})
	}
	if len(rows) > 0 {
		p.table("Rules", []string{"TENANT", "RULE", "PACKETS", "BYTES", "LAST"}, rows)
	} else if s.GetExit() == nil {
		p.line("\nRules: none, so nothing may leave")
	}
	dropTable(p, r.GetDrops())
	p.text(fmt.Sprintf("Policy in force (revision %d)", s.GetPolicyRev()), r.GetPolicy())
	rows = nil
	for _, e := range r.GetEvents() {
		rows = append(rows, []string{Time(e.GetTimeNs()), e.GetKind(), e.GetMessage()})
	}
	if len(rows) > 0 {
		p.table("Events", []string{"TIME", "KIND", "MESSAGE"}, rows)
	}
	return p.err
}

func bytesCell(n uint64) string {
	if n < 1024 {
		return count(n)
	}
	return fmt.Sprintf("%d (%s)", n, Size(n))
}

func summary(s *sandboxv1.Sandbox) [][2]string {
	spec, limits := s.GetSpec(), s.GetSpec().GetLimits()
	image := Clean(spec.GetImage())
	if d := s.GetImageDigest(); d != "" {
		image += " (" + Clean(d) + ")"
	}
	kv := [][2]string{
		{"Sandbox", s.GetId()},
		{"Name", spec.GetName()},
		{"Tenant", spec.GetTenant()},
		{"State", stateLine(s)},
		{"Image", image},
		{"Command", Command(spec.GetCommand())},
		{"User", spec.GetUser()},
		{"Workdir", spec.GetWorkdir()},
		{"Environment", envNames(spec.GetEnv())},
		{"Limits", limitsLine(limits)},
		{"Lifetime", lifetimeLine(s)},
		{"Addresses", strings.Join(s.GetAddresses(), ", ")},
		{"Published", Published(spec.GetPublish())},
		{"Egress", egressLine(s)},
		{"Workload", spec.GetWorkloadRef()},
		{"Labels", labelsLine(spec.GetLabels())},
		{"Created", Time(s.GetCreatedNs()) + " by " + orUnknown(s.GetCreatedBy())},
		{"Node", s.GetNode()},
	}
	if s.GetPid() != 0 {
		kv = append(kv, [2]string{"PID", strconv.FormatInt(s.GetPid(), 10) + " on the node"})
	}
	if s.GetExit().GetMessage() != "" {
		kv = slices.Insert(kv, 4, [2]string{"Why", s.GetExit().GetMessage()})
	}
	return slices.DeleteFunc(kv, func(e [2]string) bool { return e[1] == "" })
}

func stateLine(s *sandboxv1.Sandbox) string {
	word := strings.ToLower(strings.TrimPrefix(s.GetState().String(), "STATE_"))
	switch e := s.GetExit(); {
	case e != nil:
		how := Ending(s)
		if how == "" {
			how = "the command exited"
		}
		return fmt.Sprintf("%s at %s: %s; exit code %d", word, Time(e.GetTimeNs()), how, e.GetCode())
	case s.GetStartedNs() != 0:
		return word + ", command started at " + Time(s.GetStartedNs())
	}
	return word
}

// egressLine is empty if there is nothing to say but that it is enforced.
func egressLine(s *sandboxv1.Sandbox) string {
	var out []string
	if s.GetDegraded() != "" {
		out = append(out, "NOT ENFORCED AS IT SHOULD BE: "+s.GetDegraded())
	}
	out = append(out, s.GetBlocked()...)
	if s.GetAudit() {
		out = append(out, "audit mode: some of what would be denied passes, and is recorded")
	}
	return strings.Join(out, "; ")
}

func limitsLine(l *sandboxv1.Limits) string {
	part := func(n int64, format func(int64) string) string {
		if n == 0 {
			return "the node's default"
		}
		return format(n)
	}
	return fmt.Sprintf("cpu %s, memory %s, processes %s", part(l.GetCpuMillis(), CPU),
		part(l.GetMemoryBytes(), Size[int64]), part(l.GetPids(), func(n int64) string { return strconv.FormatInt(n, 10) }))
}

func lifetimeLine(s *sandboxv1.Sandbox) string {
	ttl := s.GetSpec().GetTtlMs()
	if ttl == 0 {
		return "no end"
	}
	line := Duration(ttl)
	if s.GetExit() == nil && s.GetStartedNs() != 0 {
		line += ", killed at " + Time(s.GetStartedNs()+ttl*1e6)
	}
	return line
}

// envNames leaves the values out: they are where credentials live, and
// reports are pasted into tickets.
func envNames(env []string) string {
	var names []string
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		names = append(names, name)
	}
	if len(names) == 0 {
		return ""
	}
	return strings.Join(names, ", ") + " (values are in -o json)"
}

func labelsLine(labels map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		out = append(out, k+"="+labels[k])
	}
	return strings.Join(out, ", ")
}
