// SPDX-License-Identifier: Apache-2.0

package api

import (
	"strings"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/tenant"
)

var states = map[sandbox.State]sandboxv1.State{
	sandbox.Admitted: sandboxv1.State_STATE_ADMITTED,
	sandbox.Placed:   sandboxv1.State_STATE_PLACED,
	sandbox.Running:  sandboxv1.State_STATE_RUNNING,
	sandbox.Paused:   sandboxv1.State_STATE_PAUSED,
	sandbox.Stopping: sandboxv1.State_STATE_STOPPING,
	sandbox.Stopped:  sandboxv1.State_STATE_STOPPED,
	sandbox.Lost:     sandboxv1.State_STATE_LOST,
}

var exitReasons = map[sandbox.ExitReason]sandboxv1.ExitReason{
	sandbox.Exited:       sandboxv1.ExitReason_EXIT_REASON_EXITED,
	sandbox.Signaled:     sandboxv1.ExitReason_EXIT_REASON_SIGNALED,
	sandbox.OOM:          sandboxv1.ExitReason_EXIT_REASON_OOM,
	sandbox.TTL:          sandboxv1.ExitReason_EXIT_REASON_TTL,
	sandbox.StoppedBy:    sandboxv1.ExitReason_EXIT_REASON_STOPPED,
	sandbox.LaunchFailed: sandboxv1.ExitReason_EXIT_REASON_LAUNCH_FAILED,
	sandbox.LostExit:     sandboxv1.ExitReason_EXIT_REASON_LOST,
}

// unixNano is 0 for the zero time.
func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// specFromProto copies what a caller sent. Check judges it afterwards.
func specFromProto(p *sandboxv1.Spec) sandbox.Spec {
	l := p.GetLimits()
	return sandbox.Spec{
		Name:    p.GetName(),
		Tenant:  tenant.Path(p.GetTenant()),
		Image:   p.GetImage(),
		Command: p.GetCommand(),
		Env:     p.GetEnv(),
		Workdir: p.GetWorkdir(),
		User:    p.GetUser(),
		Limits: sandbox.Limits{
			CPUMillis:   l.GetCpuMillis(),
			MemoryBytes: l.GetMemoryBytes(),
			PIDs:        l.GetPids(),
		},
		Policy:       p.GetPolicy(),
		TTL:          time.Duration(p.GetTtlMs()) * time.Millisecond,
		Terminal:     p.GetTerminal(),
		Stdin:        p.GetStdin(),
		AutoRemove:   p.GetAutoRemove(),
		WorkloadRef:  p.GetWorkloadRef(),
		RuntimeClass: p.GetRuntimeClass(),
		Labels:       p.GetLabels(),
	}
}

func (s *Server) toProto(r sandbox.Record) *sandboxv1.Sandbox {
	out := &sandboxv1.Sandbox{
		Id: r.ID,
		Spec: &sandboxv1.Spec{
			Name:    r.Spec.Name,
			Tenant:  string(r.Spec.Tenant),
			Image:   r.Spec.Image,
			Command: r.Spec.Command,
			Env:     r.Spec.Env,
			Workdir: r.Spec.Workdir,
			User:    r.Spec.User,
			Limits: &sandboxv1.Limits{
				CpuMillis:   r.Spec.Limits.CPUMillis,
				MemoryBytes: r.Spec.Limits.MemoryBytes,
				Pids:        r.Spec.Limits.PIDs,
			},
			Policy:       r.Spec.Policy,
			TtlMs:        r.Spec.TTL.Milliseconds(),
			Terminal:     r.Spec.Terminal,
			Stdin:        r.Spec.Stdin,
			AutoRemove:   r.Spec.AutoRemove,
			WorkloadRef:  r.Spec.WorkloadRef,
			RuntimeClass: r.Spec.RuntimeClass,
			Labels:       r.Spec.Labels,
		},
		State:       states[r.State],
		CreatedNs:   unixNano(r.Created),
		StartedNs:   unixNano(r.Started),
		CreatedBy:   r.CreatedBy,
		ImageDigest: r.ImageDigest,
		PolicyRev:   r.PolicyRev,
		Pid:         int64(s.cfg.Sandboxes.PID(r.ID)),
		NotEnforced: r.NotEnforced,
		Node:        s.cfg.NodeID,
	}
	if r.Plan != nil && r.State.Live() {
		out.Addresses = []string{r.Plan.Addr4.String(), r.Plan.Addr6.String()}
	}
	if x := r.Exit; x != nil {
		out.Exit = &sandboxv1.Exit{
			Reason:  exitReasons[x.Reason],
			Code:    int32(x.Code),
			Signal:  int32(x.Signal),
			By:      x.By,
			Message: strings.ToValidUTF8(x.Message, "?"),
			TimeNs:  unixNano(x.Time),
		}
	}
	return out
}
