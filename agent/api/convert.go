// SPDX-License-Identifier: Apache-2.0

package api

import (
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
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
func specFromProto(p *sandboxv1.Spec) (sandbox.Spec, error) {
	l := p.GetLimits()
	publish, err := portsFromProto(p.GetPublish())
	return sandbox.Spec{
		Publish: publish,
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
	}, err
}

// portsFromProto refuses numbers that are no ports; Check judges the rest.
func portsFromProto(ports []*sandboxv1.PublishedPort) ([]sandbox.Port, error) {
	var out []sandbox.Port
	for _, p := range ports {
		port := sandbox.Port{Host: uint16(p.GetHost()), Sandbox: uint16(p.GetPort())}
		if uint32(port.Host) != p.GetHost() || uint32(port.Sandbox) != p.GetPort() {
			return nil, status.Errorf(codes.InvalidArgument, "publish: %d:%d: ports are 1 to 65535", p.GetHost(), p.GetPort())
		}
		switch p.GetProtocol() {
		case "tcp":
			port.Proto = netpol.TCP
		case "udp":
			port.Proto = netpol.UDP
		default:
			return nil, status.Errorf(codes.InvalidArgument, "publish: protocol %q is not tcp or udp", p.GetProtocol())
		}
		out = append(out, port)
	}
	return out, nil
}

func portsToProto(ports []sandbox.Port) []*sandboxv1.PublishedPort {
	var out []*sandboxv1.PublishedPort
	for _, p := range ports {
		out = append(out, &sandboxv1.PublishedPort{Host: uint32(p.Host), Port: uint32(p.Sandbox), Protocol: p.Proto.String()})
	}
	return out
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
			Publish:      portsToProto(r.Spec.Publish),
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
	if enforced(r) {
		_, degraded := s.cfg.Enforced(r.ID)
		out.Degraded = strings.ToValidUTF8(degraded, "?")
		prog, err := s.cfg.Sandboxes.Program(r.ID)
		out.Audit = err == nil && prog.Mode == netpol.ModeAudit
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
