// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"io"
	"math"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// Flows implements nodev1.NodeServer.
func (s *Server) Flows(req *nodev1.FlowsRequest, stream grpc.ServerStreamingServer[nodev1.FlowsResponse]) error {
	ctx := stream.Context()
	rec, c, err := s.find(ctx, req.GetRef())
	if err != nil {
		return err
	}
	filter := egress.Filter{Denied: req.GetDenied(), Audit: req.GetAudit()}
	tail := int(max(-1, min(req.GetTail(), math.MaxInt32)))
	if !req.GetFollow() {
		for _, e := range s.cfg.Flows.Recent(rec.ID, filter, tail) {
			if err := stream.Send(entryToProto(e)); err != nil {
				return err
			}
		}
		return nil
	}
	done, ok := s.watches.take(c.UID, maxWatches)
	if !ok {
		return status.Errorf(codes.ResourceExhausted, "%s watches %d times already, and may not more often: share one watch", c, maxWatches)
	}
	defer done()
	sub := s.cfg.Flows.Subscribe(rec.ID, filter, tail)
	defer sub.Close()
	waitCtx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		if _, err := s.cfg.Sandboxes.Wait(waitCtx, rec.ID); err == nil {
			sub.Close() // what has come until then can still be read
		}
	})
	for {
		e, missed, err := sub.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return failure(err)
		}
		if missed > 0 {
			if err := stream.Send(&nodev1.FlowsResponse{Entry: &nodev1.FlowsResponse_Missed{Missed: &nodev1.Missed{Entries: missed}}}); err != nil {
				return err
			}
		}
		if err := stream.Send(entryToProto(e)); err != nil {
			return err
		}
	}
}

func entryToProto(e egress.Entry) *nodev1.FlowsResponse {
	if e.Flow != nil {
		return &nodev1.FlowsResponse{Entry: &nodev1.FlowsResponse_Flow{Flow: flowToProto(e)}}
	}
	l := e.Lookup
	return &nodev1.FlowsResponse{Entry: &nodev1.FlowsResponse_Lookup{Lookup: &nodev1.Lookup{
		TimeNs: unixNano(l.Time), Name: strings.ToValidUTF8(l.Name, "?"), Type: l.Type, Verdict: e.Verdict(),
		Outcome: l.Outcome, Tenant: l.Tenant, Rule: l.Rule, Addresses: addresses(l.Addrs),
		Detail: strings.ToValidUTF8(l.Detail, "?"), Suppressed: l.Suppressed,
	}}}
}

func flowToProto(e egress.Entry) *nodev1.Flow {
	f := e.Flow
	out := &nodev1.Flow{
		TimeNs: unixNano(f.Time), Inbound: f.Inbound, Verdict: e.Verdict(), Reason: f.Reason,
		Tenant: f.Tenant, Rule: f.Rule, Port: uint32(f.PeerPort), LocalPort: uint32(f.LocalPort),
		Names: valid(f.Names), Length: f.FlowEvent.Bytes, Packets: f.Packets, Bytes: f.Bytes,
	}
	if out.Verdict == egress.Audit {
		out.Reason = f.Audit
	}
	if f.Peer.IsValid() {
		out.Address = f.Peer.String()
	}
	if f.Proto != 0 {
		out.Protocol = f.Proto.String()
	}
	if f.Proto == netpol.ICMP {
		out.Port, out.LocalPort = 0, 0
	}
	return out
}
