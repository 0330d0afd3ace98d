// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"math"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// fakeGateway is a gateway with a fixed ledger of a few records.
type fakeGateway struct {
	gatewayv1.UnimplementedGatewayServer
	records []*usagev1.Record
}

// newFakeGateway answers the path of its socket.
func newFakeGateway(t testing.TB) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "gateway.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	serveGateway(t, l, nil)
	return sock
}

func serveGateway(t testing.TB, l net.Listener, creds credentials.TransportCredentials) {
	t.Helper()
	g := &fakeGateway{}
	day := int64(24 * 3600e9)
	for i, r := range []struct {
		tenant, sandbox, name, meter string
		delta                        uint64
		quality                      usagev1.Quality
	}{
		{"acme", "aaaaaaaaaaaa", "index", "cpu_ns", 1_200_000_000_000, usagev1.Quality_QUALITY_MEASURED},
		{"acme/vision", "bbbbbbbbbbbb", "train", "cpu_ns", 3_600_000_000_001, usagev1.Quality_QUALITY_MEASURED},
		{"acme/vision", "bbbbbbbbbbbb", "train", "egress_bytes", 5_000_000_000, usagev1.Quality_QUALITY_MEASURED},
		{"acme/vision", "bbbbbbbbbbbb", "train", "egress_bytes", 0, usagev1.Quality_QUALITY_GAP},
		{"acme/vision", "bbbbbbbbbbbb", "train", "mem_mib_ms", 3_686_400_000, usagev1.Quality_QUALITY_ALLOCATED},
		{"acme/vision", "bbbbbbbbbbbb", "train", "gpu_slice_ms", 77, usagev1.Quality_QUALITY_ALLOCATED},
		{"umbra/lab", "cccccccccccc", "big", "mem_used_mib_ms", math.MaxUint64, usagev1.Quality_QUALITY_MEASURED},
	} {
		start := epoch.UnixNano() + int64(i)*day
		g.records = append(g.records, &usagev1.Record{Source: "node/n1/boot/b1", Id: r.sandbox + "/" + r.meter + "/1/1", NodeSeq: uint64(i + 1),
			Tenant: r.tenant, Sandbox: r.sandbox, SandboxName: r.name, Meter: r.meter, Delta: r.delta, Cumulative: r.delta,
			StartNs: start, EndNs: start + 60e9, Quality: r.quality})
	}
	var opts []grpc.ServerOption
	if creds != nil {
		opts = append(opts, grpc.Creds(creds))
	}
	s := grpc.NewServer(opts...)
	gatewayv1.RegisterGatewayServer(s, g)
	done := make(chan struct{}) // closed when it has stopped serving
	go func() {
		s.Serve(l)
		close(done)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
}

func (g *fakeGateway) matching(q *gatewayv1.QueryUsageRequest) (out []*usagev1.Record) {
	for _, r := range g.records {
		if strings.HasPrefix(r.GetTenant()+"/", q.GetTenant()) && (q.GetSandbox() == "" || q.GetSandbox() == r.GetSandbox()) &&
			(q.GetMeter() == "" || q.GetMeter() == r.GetMeter()) && r.GetStartNs() >= q.GetStartNs() &&
			(q.GetEndNs() == 0 || r.GetStartNs() < q.GetEndNs()) {
			out = append(out, r)
		}
	}
	return out
}

func (g *fakeGateway) QueryUsage(_ context.Context, q *gatewayv1.QueryUsageRequest) (*gatewayv1.QueryUsageResponse, error) {
	if q.GetTenant() == "secret" {
		return nil, status.Error(codes.PermissionDenied, "not allowed to read the usage of secret")
	}
	resp := &gatewayv1.QueryUsageResponse{}
	rows := map[string]*gatewayv1.UsageRow{}
	for _, r := range g.matching(q) {
		key := r.GetTenant() + " " + r.GetMeter()
		if rows[key] == nil {
			rows[key] = &gatewayv1.UsageRow{Tenant: r.GetTenant(), Meter: r.GetMeter(), StartNs: r.GetStartNs()}
			if q.GetBySandbox() {
				rows[key].Sandbox, rows[key].SandboxName = r.GetSandbox(), r.GetSandboxName()
			}
			resp.Rows = append(resp.Rows, rows[key])
		}
		rows[key].Total += r.GetDelta()
		rows[key].TotalDecimal = strconv.FormatUint(rows[key].Total, 10)
		if r.GetMeter() == "mem_used_mib_ms" { // more than 64 bits
			rows[key].Total, rows[key].TotalDecimal = math.MaxUint64, "38654705664000000000000"
		}
		rows[key].Records++
		rows[key].EndNs = r.GetEndNs()
		if r.GetQuality() == usagev1.Quality_QUALITY_GAP {
			rows[key].GapRecords++
		}
	}
	return resp, nil
}

func (g *fakeGateway) ListRecords(q *gatewayv1.QueryUsageRequest, stream grpc.ServerStreamingServer[usagev1.Record]) error {
	for _, r := range g.matching(q) {
		if err := stream.Send(r); err != nil {
			return err
		}
	}
	return nil
}

func (g *fakeGateway) ListNodes(context.Context, *gatewayv1.ListNodesRequest) (*gatewayv1.ListNodesResponse, error) {
	return &gatewayv1.ListNodesResponse{Nodes: []*gatewayv1.NodeStatus{
		{NodeId: "node-9c", Watermark: 12, Records: 12},
		{NodeId: "node-7f", Watermark: 1200, Records: 1200, LastPushNs: epoch.UnixNano()},
	}}, nil
}
