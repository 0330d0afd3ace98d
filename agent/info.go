// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/agent/api"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

func (n *node) apiConfig() api.Config {
	return api.Config{
		Sandboxes: n.sup,
		Images:    n.runtime,
		Traffic:   egress{n.egress},
		Limits:    limits{n.egress},
		Resolver:  resolver{n.names},
		Links:     links{n.links},
		Flows:     n.flows,
		NodeID:    n.nodeID,

		MaxConnections: n.cfg.Network.MaxConnections,

		Enforced: n.sup.Enforced,
		LogDir:   n.logDir,
		NodeInfo: n.info,
		Reload:   n.reload,
		Usage:    n.sup.Usage,
	}
}

// info is the node's report about itself. Part of it may be unknown while
// containerd is away; that is said, not left out.
func (n *node) info(ctx context.Context) (*nodev1.NodeInfoResponse, error) {
	used := n.sup.InUse("")
	out := &nodev1.NodeInfoResponse{
		NodeId:          n.nodeID,
		Version:         n.opts.Version,
		Kernel:          kernel(),
		CpuMillis:       n.cpus,
		MemoryBytes:     n.memory,
		CpuMillisUsed:   used.CPUMillis,
		MemoryBytesUsed: used.MemoryBytes,
		Sandboxes:       used.Sandboxes,
		NotEnforced:     n.tree.NotEnforced(),
		CgroupMode:      n.tree.Mode().String(),
		EgressHook:      n.egress.Hook(),
		Warnings:        n.sup.Warnings(),
		Pid:             int64(os.Getpid()),
		StartedNs:       n.started.UnixNano(),
		MaxConnections:  n.cfg.Network.MaxConnections,

		ResolverUpstreams: n.upstreams,
	}
	if p := n.cfg.Network.PublishPorts; p.Hi != 0 {
		out.PublishPorts = fmt.Sprintf("%d-%d", p.Lo, p.Hi)
	}
	if n.names == nil {
		out.Warnings = append(out.Warnings, "no name resolves in sandboxes: neither dns.upstreams nor /etc/resolv.conf names a resolver")
	}
	var err error
	if out.FlowEventsLost, err = n.egress.EventsLost(); err != nil {
		out.Warnings = append(out.Warnings, "how much of the flow log was lost is not known: "+err.Error())
	}
	if out.ContainerdVersion, err = n.runtime.Version(ctx); err != nil {
		out.ContainerdVersion = "unknown"
		out.Warnings = append(out.Warnings, "containerd does not answer: "+err.Error())
	}
	if packets, bytes, err := n.links.SecondLayerDrops(); err == nil && packets > 0 {
		out.Warnings = append(out.Warnings, secondLayer(packets, bytes))
	}
	st := n.spool.Status()
	out.Spool = &nodev1.Spool{
		FirstSeq: st.First, LastSeq: st.Last, AckedSeq: st.Acked, Bytes: st.Bytes, LimitBytes: st.Limit,
		Gateway: n.cfg.Usage.Gateway, State: "none",
	}
	if n.report != nil {
		r := n.report.Status()
		out.Spool.State, out.Spool.LastError = string(r.State), r.LastError
	}
	if why := n.spoolFull(); why != "" {
		out.Spool.State = "full"
		out.Warnings = append(out.Warnings, "no sandbox can start: "+why)
	}
	return out, nil
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func secondLayer(packets, bytes uint64) string {
	return fmt.Sprintf("the second layer dropped %d packets (%d bytes) that no program had judged: a program was off its link", packets, bytes)
}
