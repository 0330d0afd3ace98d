// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

func TestQueries(t *testing.T) {
	cfg := testConfig(t.TempDir())
	start(t, cfg)
	c := dial(t, cfg.Listen[0].Addr)
	n := gatewaytest.NewNode("n1", 1)
	n.Add(&usagev1.Record{Tenant: "acme/vision", SandboxName: "job", Delta: 1<<64 - 1, StartNs: 10, EndNs: 20})
	n.Add(&usagev1.Record{Tenant: "acme/vision", SandboxName: "job", Delta: 2, StartNs: 20, EndNs: 30})
	n.Add(&usagev1.Record{Tenant: "acmeX", Delta: 7, StartNs: 20, EndNs: 30})
	before := time.Now()
	if _, err := c.push(t.Context(), "n1", n.Sent); err != nil {
		t.Fatal(err)
	}

	usage, err := c.gateway.QueryUsage(t.Context(), &gatewayv1.QueryUsageRequest{Tenant: "acme", BySandbox: true})
	if err != nil {
		t.Fatal(err)
	}
	wantUsage := []*gatewayv1.UsageRow{{Tenant: "acme/vision", Sandbox: "aaaaaaaaaaaa", SandboxName: "job", Meter: "cpu_ns",
		Total: 1<<64 - 1, TotalDecimal: "18446744073709551617", Records: 2, StartNs: 10, EndNs: 30}}
	if diff := cmp.Diff(wantUsage, usage.GetRows(), protocmp.Transform()); diff != "" {
		t.Errorf("usage (-want +got):\n%s", diff)
	}
	usage, err = c.gateway.QueryUsage(t.Context(), &gatewayv1.QueryUsageRequest{StartNs: 15})
	if err != nil {
		t.Fatal(err)
	}
	wantUsage = []*gatewayv1.UsageRow{
		{Tenant: "acme/vision", Meter: "cpu_ns", Total: 2, TotalDecimal: "2", Records: 1, StartNs: 20, EndNs: 30},
		{Tenant: "acmeX", Meter: "cpu_ns", Total: 7, TotalDecimal: "7", Records: 1, StartNs: 20, EndNs: 30},
	}
	if diff := cmp.Diff(wantUsage, usage.GetRows(), protocmp.Transform()); diff != "" {
		t.Errorf("usage (-want +got):\n%s", diff)
	}

	stream, err := c.gateway.ListRecords(t.Context(), &gatewayv1.QueryUsageRequest{Tenant: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	var got []*usagev1.Record
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, r)
	}
	if diff := cmp.Diff(n.Sent[:2], got, protocmp.Transform()); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}

	nodes, err := c.gateway.ListNodes(t.Context(), &gatewayv1.ListNodesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := []*gatewayv1.NodeStatus{{NodeId: "n1", Watermark: 3, Records: 3}}
	if diff := cmp.Diff(want, nodes.GetNodes(), protocmp.Transform(), protocmp.IgnoreFields(&gatewayv1.NodeStatus{}, "last_push_ns")); diff != "" {
		t.Errorf("nodes (-want +got):\n%s", diff)
	}
	if at := time.Unix(0, nodes.GetNodes()[0].GetLastPushNs()); at.Before(before) || at.After(time.Now()) {
		t.Errorf("got last push at %v, want between %v and now", at, before)
	}

	for _, req := range []*gatewayv1.QueryUsageRequest{
		{StartNs: 5, EndNs: 5}, {StartNs: 6, EndNs: 5}, {StartNs: -1}, {EndNs: -1}, {Tenant: "acme/"}, {Tenant: "/acme"}, {Tenant: "a//b"}, {Tenant: "/"},
	} {
		_, err := c.gateway.QueryUsage(t.Context(), req)
		wantCode(t, err, codes.InvalidArgument, "")
		stream, err := c.gateway.ListRecords(t.Context(), req)
		if err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, err, codes.InvalidArgument, "")
	}

	resp, err := healthv1.NewHealthClient(c.conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil || resp.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("health: got %v, %v, want SERVING", resp.GetStatus(), err)
	}
}
