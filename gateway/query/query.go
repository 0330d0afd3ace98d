// SPDX-License-Identifier: Apache-2.0

// Package query serves the Gateway service: sums and single records of the
// ledger, and how far each node's records have arrived. It only reads.
//
// Over TLS it answers the certificates that tls.operators names and nobody
// else; a node's certificate reads nothing.
package query

import (
	"context"
	"errors"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/gateway/caller"
	"github.com/bulkheadhq/bulkhead/gateway/ledger"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// maxDuration is the longest that one sum may read. While it does, the ledger's
// WAL cannot be emptied.
const maxDuration = 2 * time.Minute

// reader is what query needs of a ledger.
type reader interface {
	Usage(ctx context.Context, f ledger.Filter, bySandbox bool) ([]ledger.Row, error)
	Records(ctx context.Context, f ledger.Filter, yield func(*usagev1.Record) error) error
	Nodes(ctx context.Context) ([]ledger.Node, error)
}

// Server implements [gatewayv1.GatewayServer].
type Server struct {
	gatewayv1.UnimplementedGatewayServer

	ledger    reader
	operators []string
}

// New makes a server.
func New(r reader, operators []string) *Server {
	return &Server{ledger: r, operators: operators}
}

// QueryUsage implements [gatewayv1.GatewayServer].
func (s *Server) QueryUsage(ctx context.Context, req *gatewayv1.QueryUsageRequest) (*gatewayv1.QueryUsageResponse, error) {
	f, err := s.filter(ctx, req)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, maxDuration)
	defer cancel()
	rows, err := s.ledger.Usage(ctx, f, req.GetBySandbox())
	if err != nil {
		return nil, toStatus(ctx, err)
	}
	resp := &gatewayv1.QueryUsageResponse{Rows: make([]*gatewayv1.UsageRow, 0, len(rows))}
	for _, r := range rows {
		total := uint64(math.MaxUint64)
		if r.Total.IsUint64() {
			total = r.Total.Uint64()
		}
		resp.Rows = append(resp.Rows, &gatewayv1.UsageRow{
			Tenant: r.Tenant, Sandbox: r.Sandbox, SandboxName: r.SandboxName, Meter: r.Meter,
			Total: total, TotalDecimal: r.Total.String(),
			Records: r.Records, GapRecords: r.GapRecords, StartNs: r.StartNs, EndNs: r.EndNs,
		})
	}
	return resp, nil
}

// ListRecords implements [gatewayv1.GatewayServer].
func (s *Server) ListRecords(req *gatewayv1.QueryUsageRequest, stream grpc.ServerStreamingServer[usagev1.Record]) error {
	ctx := stream.Context()
	f, err := s.filter(ctx, req)
	if err != nil {
		return err
	}
	if err := s.ledger.Records(ctx, f, stream.Send); err != nil {
		return toStatus(ctx, err)
	}
	return nil
}

// ListNodes implements [gatewayv1.GatewayServer].
func (s *Server) ListNodes(ctx context.Context, _ *gatewayv1.ListNodesRequest) (*gatewayv1.ListNodesResponse, error) {
	if err := caller.MayQuery(ctx, s.operators); err != nil {
		return nil, err
	}
	nodes, err := s.ledger.Nodes(ctx)
	if err != nil {
		return nil, toStatus(ctx, err)
	}
	resp := &gatewayv1.ListNodesResponse{}
	for _, n := range nodes {
		// Contiguous from 1, so the watermark is the count as well.
		resp.Nodes = append(resp.Nodes, &gatewayv1.NodeStatus{
			NodeId: n.ID, Watermark: n.Mark.Seq, Records: n.Mark.Seq, LastPushNs: n.LastPush.UnixNano(),
		})
	}
	return resp, nil
}

// filter checks the caller and the question.
func (s *Server) filter(ctx context.Context, req *gatewayv1.QueryUsageRequest) (ledger.Filter, error) {
	if err := caller.MayQuery(ctx, s.operators); err != nil {
		return ledger.Filter{}, err
	}
	if req.GetStartNs() < 0 || req.GetEndNs() < 0 {
		return ledger.Filter{}, status.Error(codes.InvalidArgument, "an interval bound is negative")
	}
	if req.GetEndNs() != 0 && req.GetEndNs() <= req.GetStartNs() {
		return ledger.Filter{}, status.Errorf(codes.InvalidArgument, "interval [%d, %d) is empty", req.GetStartNs(), req.GetEndNs())
	}
	if t := "/" + req.GetTenant() + "/"; t != "//" && strings.Contains(t, "//") {
		return ledger.Filter{}, status.Errorf(codes.InvalidArgument, "tenant %q is not a path as in acme/vision", req.GetTenant())
	}
	return ledger.Filter{
		Tenant: req.GetTenant(), Sandbox: req.GetSandbox(), Meter: req.GetMeter(),
		StartNs: req.GetStartNs(), EndNs: req.GetEndNs(),
	}, nil
}

// toStatus gives an error of the ledger its code. One of sending has it already.
func toStatus(ctx context.Context, err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case errors.Is(err, ledger.ErrTooMany):
		return status.Errorf(codes.ResourceExhausted, "%v; ask for a shorter interval, one tenant or one meter", err)
	}
	return status.Error(codes.Internal, err.Error())
}
