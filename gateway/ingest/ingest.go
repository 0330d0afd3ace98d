// SPDX-License-Identifier: Apache-2.0

// Package ingest serves the Usage service: it takes batches of records from
// nodes, has the ledger commit them, and only then acknowledges them.
//
// It keeps nothing. An acknowledgement carries the node's watermark as the
// ledger has it; a batch that was not acknowledged may or may not be in the
// ledger, and sending it again is right in both cases. It never repairs,
// reorders or drops a record.
//
// Memory is bounded: a stream holds the batch that is being committed and the
// one that follows, a batch is at most [MaxMessageBytes], and there are at
// most [MaxStreams] streams.
package ingest

import (
	"context"
	"errors"
	"io"
	"log/slog"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/gateway/caller"
	"github.com/bulkheadhq/bulkhead/gateway/ledger"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

const (
	// MaxMessageBytes holds ledger.MaxRecords of the longest records.
	MaxMessageBytes = 4 << 20

	// MaxStreams is the most Push calls at once, over all connections.
	MaxStreams = 4096
)

// store is what ingest needs of a ledger.
type store interface {
	Append(ctx context.Context, node string, records []*usagev1.Record) (ledger.Mark, error)
	Watermark(ctx context.Context, node string) (ledger.Mark, error)
}

// Server implements [usagev1.UsageServer].
type Server struct {
	usagev1.UnimplementedUsageServer

	store    store
	stopping <-chan struct{}
	log      *slog.Logger
	streams  *semaphore.Weighted
}

// New makes a server. When stopping is closed, by the caller of New, every Push
// ends after the batch in hand.
func New(store store, stopping <-chan struct{}, log *slog.Logger) *Server {
	return &Server{store: store, stopping: stopping, log: log, streams: semaphore.NewWeighted(MaxStreams)}
}

// received is one answer of a stream's Recv.
type received struct {
	req *usagev1.PushRequest
	err error
}

// Push implements [usagev1.UsageServer].
func (s *Server) Push(stream usagev1.Usage_PushServer) error {
	if !s.streams.TryAcquire(1) {
		return status.Errorf(codes.ResourceExhausted, "%d nodes push already; try again later", MaxStreams)
	}
	defer s.streams.Release(1)

	ctx := stream.Context()
	// The next batch arrives while this one is committed, and an idle stream
	// can end when the gateway does. Not buffered: one batch waits in the
	// receiver, which ends when the stream does, at the latest when Push returns.
	in := make(chan received)
	go func() {
		for {
			req, err := stream.Recv()
			select {
			case in <- received{req, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()

	var node string
	for {
		select {
		case <-s.stopping:
			return status.Error(codes.Unavailable, "gateway is stopping")
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case r := <-in:
			if errors.Is(r.err, io.EOF) {
				return nil
			}
			if r.err != nil {
				return r.err
			}
			if node == "" {
				node = r.req.GetNodeId()
			}
			if err := s.push(stream, node, r.req); err != nil {
				return err
			}
		}
	}
}

// push commits and acknowledges one batch.
func (s *Server) push(stream usagev1.Usage_PushServer, node string, req *usagev1.PushRequest) error {
	if req.GetNodeId() == "" || req.GetNodeId() != node {
		return status.Errorf(codes.InvalidArgument, "node_id is %q, want %q: a stream is for one node", req.GetNodeId(), node)
	}
	ctx := stream.Context()
	if err := caller.MayPush(ctx, node); err != nil {
		return err
	}
	mark, err := s.store.Append(ctx, node, req.GetRecords())
	if err != nil {
		return s.refuse(ctx, node, err)
	}
	s.log.LogAttrs(ctx, slog.LevelDebug, "batch committed",
		slog.String("node", node), slog.Int("records", len(req.GetRecords())), slog.Uint64("watermark", mark.Seq))
	return stream.Send(&usagev1.PushResponse{NodeSeq: mark.Seq})
}

// Watermark implements [usagev1.UsageServer].
func (s *Server) Watermark(ctx context.Context, req *usagev1.WatermarkRequest) (*usagev1.WatermarkResponse, error) {
	if req.GetNodeId() == "" {
		return nil, status.Error(codes.InvalidArgument, "no node_id")
	}
	if err := caller.MayPush(ctx, req.GetNodeId()); err != nil {
		return nil, err
	}
	mark, err := s.store.Watermark(ctx, req.GetNodeId())
	if err != nil {
		return nil, s.refuse(ctx, req.GetNodeId(), err)
	}
	return response(mark), nil
}

func response(m ledger.Mark) *usagev1.WatermarkResponse {
	return &usagev1.WatermarkResponse{NodeSeq: m.Seq, Hash: m.Hash}
}

// refuse turns an error of the ledger into a status. The node learns it and
// keeps its records; the operators of this gateway are told here.
func (s *Server) refuse(ctx context.Context, node string, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	level, st := slog.LevelError, status.New(codes.Internal, err.Error())
	var gap *ledger.GapError
	switch {
	case errors.Is(err, ledger.ErrInvalid):
		level, st = slog.LevelWarn, status.New(codes.InvalidArgument, err.Error())
	case errors.Is(err, ledger.ErrConflict):
		st = status.New(codes.FailedPrecondition, err.Error())
	case errors.As(err, &gap):
		// The node learns where to go on from the detail. Usual after the
		// ledger was restored from a backup.
		level, st = slog.LevelWarn, status.New(codes.OutOfRange, err.Error())
		if detailed, err := st.WithDetails(response(gap.Mark)); err == nil {
			st = detailed
		}
	case errors.Is(err, ledger.ErrFull):
		st = status.New(codes.ResourceExhausted, err.Error())
	case errors.Is(err, ledger.ErrBusy), errors.Is(err, ledger.ErrFailed):
		st = status.New(codes.Unavailable, err.Error())
	}
	s.log.LogAttrs(ctx, level, "batch refused", slog.String("node", node), slog.String("code", st.Code().String()), slog.Any("err", err))
	return st.Err()
}
