// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/bulkheadhq/bulkhead/gateway/gatewaytest"
	"github.com/bulkheadhq/bulkhead/gateway/ledger"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// brokenStore answers what no healthy ledger can be made to answer on demand.
type brokenStore struct{ err error }

func (b brokenStore) Append(context.Context, string, []*usagev1.Record) (ledger.Mark, error) {
	return ledger.Mark{}, b.err
}

func (b brokenStore) Watermark(context.Context, string) (ledger.Mark, error) {
	return ledger.Mark{}, b.err
}

// serve serves s on a unix socket.
func serve(t testing.TB, s *Server) usagev1.UsageClient {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	lis, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(MaxMessageBytes))
	usagev1.RegisterUsageServer(server, s)
	go server.Serve(lis)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return usagev1.NewUsageClient(conn)
}

func TestErrorsOfTheLedger(t *testing.T) {
	tests := []struct {
		err  error
		want codes.Code
	}{
		{ledger.ErrFull, codes.ResourceExhausted},
		{ledger.ErrBusy, codes.Unavailable},
		{ledger.ErrFailed, codes.Unavailable},
		{ledger.ErrInvalid, codes.InvalidArgument},
		{&ledger.ConflictError{Kind: ledger.KindID}, codes.FailedPrecondition},
		{&ledger.GapError{Mark: ledger.Mark{Seq: 3}}, codes.OutOfRange},
		{errors.New("anything else"), codes.Internal},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.err), func(t *testing.T) {
			c := serve(t, New(brokenStore{fmt.Errorf("append: %w", tt.err)}, nil, slog.New(slog.DiscardHandler)))
			stream, err := c.Push(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			stream.Send(&usagev1.PushRequest{NodeId: "n1", Records: gatewaytest.NewNode("n1", 1).Batch(1)})
			if _, err := stream.Recv(); status.Code(err) != tt.want {
				t.Errorf("push: got %v, want %v", err, tt.want)
			}
			if _, err := c.Watermark(t.Context(), &usagev1.WatermarkRequest{NodeId: "n1"}); status.Code(err) != tt.want {
				t.Errorf("watermark: got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestStreamsAreLimited(t *testing.T) {
	s := New(brokenStore{}, nil, slog.New(slog.DiscardHandler))
	if !s.streams.TryAcquire(MaxStreams) {
		t.Fatal("a new server has streams")
	}
	c := serve(t, s)
	stream, err := c.Push(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v, want ResourceExhausted", err)
	}
	// A stream that ends gives its place back.
	s.streams.Release(1)
	for range 3 {
		stream, err := c.Push(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		stream.CloseSend()
		if _, err := stream.Recv(); err == nil || status.Code(err) == codes.ResourceExhausted {
			t.Errorf("got %v, want the end of the stream", err)
		}
		for end := time.Now().Add(5 * time.Second); !s.streams.TryAcquire(1); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the stream has kept its place")
			}
		}
		s.streams.Release(1)
	}
}

// Whatever a node sends, the ledger accepts it whole or refuses it by name, and
// what it accepted is a chain.
func FuzzPush(f *testing.F) {
	n := gatewaytest.NewNode("n1", 1)
	n.Add(&usagev1.Record{Delta: 5, Resource: &usagev1.Resource{GpuUuid: "g", FractionDen: 1}})
	n.Batch(2)
	for i := range n.Sent {
		data, err := proto.Marshal(&usagev1.PushRequest{NodeId: "n1", Records: n.Sent[:i+1]})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, false)
		f.Add(data, true)
	}
	l, err := ledger.Open(ledger.Config{Dir: f.TempDir()})
	if err != nil {
		f.Fatal(err)
	}
	defer l.Close()
	f.Fuzz(func(t *testing.T, data []byte, rehash bool) {
		var req usagev1.PushRequest
		if proto.Unmarshal(data, &req) != nil {
			return
		}
		if rehash { // past the hash check, to what lies behind it
			mark, err := l.Watermark(t.Context(), req.GetNodeId())
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range req.GetRecords() {
				if r != nil {
					r.NodeSeq, r.PrevHash = mark.Seq+1, mark.Hash
					r.Hash = usagev1.Hash(r.PrevHash, r)
					mark = ledger.Mark{Seq: r.NodeSeq, Hash: r.Hash}
				}
			}
		}
		mark, err := l.Append(t.Context(), req.GetNodeId(), req.GetRecords())
		switch {
		case err == nil:
			if got, err := l.Verify(t.Context(), req.GetNodeId()); err != nil || got != mark.Seq {
				t.Errorf("verify: got %d, %v, want %d", got, err, mark.Seq)
			}
		case errors.Is(err, ledger.ErrInvalid), errors.Is(err, ledger.ErrConflict), errors.Is(err, ledger.ErrGap):
		default:
			t.Errorf("got %v, want a refusal", err)
		}
	})
}
