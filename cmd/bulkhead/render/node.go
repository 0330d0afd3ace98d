// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// Node writes the report of a node. What is not enforced comes first.
func Node(w io.Writer, n *nodev1.NodeInfoResponse) error {
	p := &page{w: w}
	if len(n.GetNotEnforced()) > 0 {
		p.line("NOT ENFORCED ON THIS NODE:")
		for _, s := range n.GetNotEnforced() {
			p.line("  - " + Clean(s))
		}
		p.line("")
	}
	p.pairs([][2]string{
		{"Node", n.GetNodeId()},
		{"Agent", fmt.Sprintf("%s, pid %d, since %s", n.GetVersion(), n.GetPid(), Time(n.GetStartedNs()))},
		{"Kernel", n.GetKernel()},
		{"containerd", n.GetContainerdVersion()},
		{"Cgroups", n.GetCgroupMode()},
		{"Egress", egress(n)},
		{"Published ports", orOff(n.GetPublishPorts())},
		{"Resolver", resolver(n.GetResolverUpstreams())},
		{"Sandboxes", sandboxes(n)},
		{"CPU", fmt.Sprintf("%s of %s reserved", CPU(n.GetCpuMillisUsed()), CPU(n.GetCpuMillis()))},
		{"Memory", fmt.Sprintf("%s of %s reserved", Size(n.GetMemoryBytesUsed()), Size(n.GetMemoryBytes()))},
		{"Enforced", enforced(n.GetNotEnforced())},
		{"Gateway", gateway(n.GetSpool())},
		{"Usage spool", spool(n.GetSpool())},
	})
	p.list("Warnings", n.GetWarnings())
	return p.err
}

func hook(h string) string {
	if h == "" {
		return "no hook"
	}
	return h + ", deny by default"
}

// sandboxes says how many there are, and how many of them need a look.
func sandboxes(n *nodev1.NodeInfoResponse) string {
	line := strconv.FormatInt(n.GetSandboxes(), 10)
	for _, x := range []struct {
		n    uint32
		what string
	}{
		{n.GetDegraded(), "NOT ENFORCED"},
		{n.GetBlocked(), "with a budget that is spent"},
		{n.GetAuditing(), "in audit mode"},
	} {
		if x.n > 0 {
			line += fmt.Sprintf(", %d %s", x.n, x.what)
		}
	}
	return line
}

// egress says how it is enforced.
func egress(n *nodev1.NodeInfoResponse) string {
	line := hook(n.GetEgressHook())
	if m := n.GetMaxConnections(); m > 0 {
		line += fmt.Sprintf("; at most %d connections of a sandbox", m)
	}
	if lost := n.GetFlowEventsLost(); lost > 0 {
		line += fmt.Sprintf("; %d entries of flow logs lost", lost)
	}
	return line
}

func orOff(ports string) string {
	if ports == "" {
		return "off"
	}
	return ports
}

func resolver(upstreams []string) string {
	if len(upstreams) == 0 {
		return "no upstream: names do not resolve"
	}
	return strings.Join(upstreams, ", ")
}

func enforced(missing []string) string {
	if len(missing) == 0 {
		return "everything"
	}
	return "not everything, see above"
}

func gateway(s *nodev1.Spool) string {
	if s.GetState() == "none" || s.GetGateway() == "" {
		return "none configured; usage stays on this node"
	}
	line := s.GetGateway() + ", " + orUnknown(s.GetState())
	if s.GetLastError() != "" {
		line += " (" + s.GetLastError() + ")"
	}
	return line
}

func spool(s *nodev1.Spool) string {
	if s == nil {
		return "unknown"
	}
	waiting := uint64(0)
	if s.GetLastSeq() > s.GetAckedSeq() {
		waiting = s.GetLastSeq() - s.GetAckedSeq()
	}
	line := fmt.Sprintf("%d records waiting (last %d, acknowledged %d), %s of %s",
		waiting, s.GetLastSeq(), s.GetAckedSeq(), Size(s.GetBytes()), Size(s.GetLimitBytes()))
	if s.GetState() == "full" {
		line += "; FULL: new sandboxes are refused until the gateway has taken records"
	}
	return line
}

// Tenants writes one line a tenant, each resource as in use / limit.
func Tenants(w io.Writer, ts []*nodev1.Tenant) error {
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	var rows [][]string
	for _, t := range ts {
		used, limit := t.GetInUse(), t.GetLimit()
		rows = append(rows, []string{t.GetPath(),
			share(used.GetCpuMillis(), limit.GetCpuMillis(), CPU),
			share(used.GetMemoryBytes(), limit.GetMemoryBytes(), Size[int64]),
			share(used.GetPids(), limit.GetPids(), number),
			share(used.GetSandboxes(), limit.GetSandboxes(), number),
			strings.Join(t.GetRules(), ","), t.GetFile()})
	}
	return Table(w, []string{"TENANT", "CPU", "MEMORY", "PROCESSES", "SANDBOXES", "RULES", "FILE"}, rows)
}

func share(used, limit int64, format func(int64) string) string {
	if limit == 0 {
		return format(used) + " / no limit"
	}
	return format(used) + " / " + format(limit)
}

// Images writes one line an image.
func Images(w io.Writer, images []*nodev1.Image) error {
	var rows [][]string
	for _, i := range images {
		rows = append(rows, []string{i.GetReference(), i.GetDigest(), Size(i.GetSizeBytes()), Time(i.GetCreatedNs())})
	}
	return Table(w, []string{"REFERENCE", "DIGEST", "SIZE", "CREATED"}, rows)
}

// Nodes writes how far each node's records have arrived at the gateway.
func Nodes(w io.Writer, nodes []*gatewayv1.NodeStatus) error {
	var rows [][]string
	for _, n := range nodes {
		rows = append(rows, []string{n.GetNodeId(), count(n.GetWatermark()), count(n.GetRecords()), Time(n.GetLastPushNs())})
	}
	return Table(w, []string{"NODE", "WATERMARK", "RECORDS", "LAST PUSH"}, rows)
}
