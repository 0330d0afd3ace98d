// SPDX-License-Identifier: Apache-2.0

// Package api serves proto/node/v1 on the node's unix socket: it turns
// messages into domain values and back, asks the kernel who is calling, lets a
// caller see and touch only its own tenants' sandboxes, and turns errors into
// gRPC codes. It decides nothing else.
//
// A sandbox of a tenant that the caller has no part in does not exist for it.
// What one user may hold of the agent at once is bounded, see share.go.
package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/store"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Images is the image side of a runtime.
type Images interface {
	Images(ctx context.Context) ([]runtime.Image, error)
	Import(ctx context.Context, r io.Reader) ([]runtime.Image, error)
	Pull(ctx context.Context, ref string, plainHTTP bool) (runtime.Image, error)
}

// Traffic answers what the egress program counted and would decide.
type Traffic interface {
	Network(slot uint32) (*nodev1.Network, []*nodev1.DropCounter, error)
	Rules(id string, slot uint32) ([]*nodev1.RuleCounter, error)
	Explain(slot uint32, f netpol.Flow) (*nodev1.ExplainResponse, error)
}

// Limits answers for the limits of policies and for audit mode, from the
// kernel.
type Limits interface {
	Rates(id string, slot uint32) ([]egress.Rate, error)
	Budgets() ([]egress.Budget, error)
	Audited(id string, slot uint32) ([]egress.Audited, error)
}

// Resolver answers what the resolver of a sandbox knows and has counted.
type Resolver interface {
	Names(id string) []egress.Name
	Resolver(id string) egress.Resolver
}

// Links answers for the links of sandboxes.
type Links interface {
	// Connections is how many packets were dropped because their connection
	// would have been beyond the cap.
	Connections(id string) (refused uint64, err error)
}

// Config of a Server; all fields are required.
type Config struct {
	Sandboxes *supervisor.Supervisor
	Images    Images
	Traffic   Traffic
	Limits    Limits
	Resolver  Resolver
	Links     Links
	Flows     *egress.Hub
	NodeID    string
	// MaxConnections is how many a sandbox may have open at once.
	MaxConnections uint32
	// Enforced answers when the egress of a running sandbox was last found to be
	// enforced, the zero time if not yet, and why it is not now.
	Enforced func(id string) (verified time.Time, degraded string)
	LogDir   func(id string) string
	NodeInfo func(ctx context.Context) (*nodev1.NodeInfoResponse, error)
	Reload   func(ctx context.Context) (tenants, updated int, err error)
	Usage    func() map[string]meter.Mark
}

// Server implements nodev1.NodeServer.
type Server struct {
	nodev1.UnimplementedNodeServer
	cfg     Config
	calls   share
	watches share
}

// maxMessage bounds one message of a caller.
const maxMessage = 4 << 20

// maxGrace bounds what a caller may ask for between TERM and KILL.
const maxGrace = 24 * time.Hour

// Serve answers calls on l until ctx ends. It closes l.
func Serve(ctx context.Context, cfg Config, l net.Listener) error {
	s := &Server{cfg: cfg}
	srv := grpc.NewServer(
		grpc.Creds(peerCred{}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(1024),
		grpc.WaitForHandlers(true), // what they use is closed once Serve has returned
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			done, err := s.enter(ctx)
			if err != nil {
				return nil, err
			}
			defer done()
			return next(withoutMetadata(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			done, err := s.enter(stream.Context())
			if err != nil {
				return err
			}
			defer done()
			return next(srv, bareStream{stream})
		}),
	)
	nodev1.RegisterNodeServer(srv, s)
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(2*time.Second, srv.Stop) // streams such as logs -f never end by themselves
		defer timer.Stop()
		srv.GracefulStop()
	})
	defer stop()
	if err := srv.Serve(&door{Listener: l}); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// enter counts a call of its caller until done is called.
func (s *Server) enter(ctx context.Context) (done func(), err error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	done, ok := s.calls.take(c.UID, maxCalls)
	if !ok {
		return nil, status.Errorf(codes.ResourceExhausted, "%s has %d calls under way, and may not have more: end some", c, maxCalls)
	}
	return done, nil
}

// withoutMetadata drops what the caller put into the headers. The context
// travels on to the containerd client, which would read a namespace or a lease
// out of them.
func withoutMetadata(ctx context.Context) context.Context {
	return metadata.NewIncomingContext(ctx, nil)
}

type bareStream struct{ grpc.ServerStream }

func (s bareStream) Context() context.Context { return withoutMetadata(s.ServerStream.Context()) }

// failure turns an error into a gRPC status, in one place.
func failure(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	var (
		denied  *admit.Denied
		spec    *sandbox.SpecError
		policy  *netpol.Error
		taken   *store.NameTakenError
		message = strings.ToValidUTF8(err.Error(), "?")
	)
	switch {
	case errors.As(err, &denied):
		code := codes.ResourceExhausted
		if denied.Reason == admit.TenantUnknown {
			code = codes.NotFound
		}
		st := status.New(code, message)
		if with, derr := st.WithDetails(&nodev1.Denial{
			Reason: string(denied.Reason), Resource: denied.Resource, Limit: denied.Limit,
			InUse: denied.InUse, Want: denied.Want, SetBy: denied.SetBy, File: denied.File,
		}); derr == nil {
			st = with
		}
		return st.Err()
	case errors.As(err, &spec), errors.As(err, &policy),
		errors.Is(err, runtime.ErrInvalidArchive), errors.Is(err, runtime.ErrInvalidSpec):
		return status.Error(codes.InvalidArgument, message)
	case errors.As(err, &taken), errors.Is(err, runtime.ErrExists):
		return status.Error(codes.AlreadyExists, message)
	case errors.Is(err, supervisor.ErrNotFound), errors.Is(err, runtime.ErrImageNotFound):
		return status.Error(codes.NotFound, message)
	case errors.Is(err, supervisor.ErrAmbiguous):
		return status.Error(codes.InvalidArgument, message)
	case errors.Is(err, supervisor.ErrNotStopped), errors.Is(err, runtime.ErrNotRunning), errors.Is(err, runtime.ErrNoAttach):
		return status.Error(codes.FailedPrecondition, message)
	case errors.Is(err, runtime.ErrCommand):
		return status.Error(codes.InvalidArgument, message)
	case errors.Is(err, store.ErrNoSlot), errors.Is(err, runtime.ErrSlowReader):
		return status.Error(codes.ResourceExhausted, message)
	case errors.Is(err, supervisor.ErrLeaving):
		return status.Error(codes.Unavailable, message)
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, message)
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, message)
	}
	return status.Error(codes.Internal, message)
}

// find resolves a reference among what the caller may see.
func (s *Server) find(ctx context.Context, ref string) (sandbox.Record, Caller, error) {
	c, err := caller(ctx)
	if err != nil {
		return sandbox.Record{}, c, err
	}
	if ref == "" {
		return sandbox.Record{}, c, status.Error(codes.InvalidArgument, "name a sandbox")
	}
	rec, err := s.cfg.Sandboxes.Find(ref, s.mayAct(c))
	return rec, c, failure(err)
}

// Create implements nodev1.NodeServer.
func (s *Server) Create(ctx context.Context, req *nodev1.CreateRequest) (*nodev1.CreateResponse, error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	spec, err := specFromProto(req.GetSpec())
	if err != nil {
		return nil, err
	}
	path, err := tenant.ParsePath(string(spec.Tenant))
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "tenant: %v", err)
	}
	if !s.mayAct(c)(path) {
		return nil, status.Errorf(codes.PermissionDenied, "%s may not act for %s: it is not among the members of it or of a tenant above it", c, path)
	}
	rec, err := s.cfg.Sandboxes.Create(ctx, spec, c.String())
	if err != nil {
		return nil, failure(err)
	}
	if !req.GetNoWait() {
		if rec, err = s.cfg.Sandboxes.Launched(ctx, rec.ID); err != nil {
			return nil, failure(err)
		}
		if x := rec.Exit; x != nil && x.Reason == sandbox.LaunchFailed {
			return nil, status.Errorf(codes.Aborted, "sandbox %s (%s) did not start: %s", rec.Spec.Name, rec.ID, strings.ToValidUTF8(x.Message, "?"))
		}
	}
	return &nodev1.CreateResponse{Sandbox: s.toProto(rec)}, nil
}

// Get implements nodev1.NodeServer.
func (s *Server) Get(ctx context.Context, req *nodev1.GetRequest) (*nodev1.GetResponse, error) {
	rec, _, err := s.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	out := &nodev1.GetResponse{Sandbox: s.toProto(rec)}
	if out.Sandbox.Blocked, err = s.blocked(rec); err != nil {
		return nil, failure(err)
	}
	for _, e := range rec.Events {
		out.Events = append(out.Events, &nodev1.Event{TimeNs: unixNano(e.At), Kind: e.Kind, Message: strings.ToValidUTF8(e.Message, "?")})
	}
	if prog, err := s.cfg.Sandboxes.Program(rec.ID); err == nil {
		out.Policy = prog.Describe()
	}
	if !enforced(rec) {
		return out, nil
	}
	network, drops, err := s.cfg.Traffic.Network(rec.Slot)
	rules, rerr := s.cfg.Traffic.Rules(rec.ID, rec.Slot)
	if !enforced(s.now(rec)) {
		return out, nil // it ended meanwhile, and its slot may be another's
	}
	if err := errors.Join(err, rerr); err != nil {
		return nil, failure(err)
	}
	last := s.cfg.Flows.Last(rec.ID)
	for _, r := range rules {
		r.LastEventNs = max(r.LastEventNs, unixNano(last[egress.RuleKey{Tenant: r.Tenant, Rule: r.Rule}]))
	}
	out.Network, out.Drops, out.Rules = network, drops, rules
	return out, nil
}

// enforced reports whether a sandbox has the slot that its record names, with
// its policy in it.
func enforced(rec sandbox.Record) bool {
	return rec.State == sandbox.Running || rec.State == sandbox.Paused
}

// now is the record of a sandbox as it is now; one that has gone is Stopped.
func (s *Server) now(rec sandbox.Record) sandbox.Record {
	now, err := s.cfg.Sandboxes.Find(rec.ID, func(tenant.Path) bool { return true })
	if err != nil {
		rec.State = sandbox.Stopped
		return rec
	}
	return now
}

// within reports whether a record is of the subtree asked for and visible.
func within(filter string, may func(tenant.Path) bool) func(sandbox.Record) bool {
	return func(r sandbox.Record) bool {
		return may(r.Spec.Tenant) && (filter == "" || tenant.Path(filter).Contains(r.Spec.Tenant))
	}
}

// List implements nodev1.NodeServer.
func (s *Server) List(ctx context.Context, req *nodev1.ListRequest) (*nodev1.ListResponse, error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	in := within(req.GetTenant(), s.mayAct(c))
	budgets, err := s.cfg.Limits.Budgets()
	if err != nil {
		return nil, failure(err)
	}
	out := &nodev1.ListResponse{}
	for _, rec := range s.cfg.Sandboxes.List() {
		if in(rec) && (req.GetAll() || rec.State.Live()) {
			sb := s.toProto(rec)
			sb.Blocked = spent(s.budgets(rec, budgets))
			sb.Spec.Env, sb.Spec.Policy = nil, "" // large, and secrets: Get has them
			out.Sandboxes = append(out.Sandboxes, sb)
		}
	}
	return out, nil
}

// Watch implements nodev1.NodeServer.
func (s *Server) Watch(req *nodev1.WatchRequest, stream grpc.ServerStreamingServer[nodev1.WatchResponse]) error {
	c, err := caller(stream.Context())
	if err != nil {
		return err
	}
	in := within(req.GetTenant(), s.mayAct(c))
	done, ok := s.watches.take(c.UID, maxWatches)
	if !ok {
		return status.Errorf(codes.ResourceExhausted, "%s watches %d times already, and may not more often: share one watch", c, maxWatches)
	}
	defer done()
	now, sub := s.cfg.Sandboxes.Subscribe()
	defer sub.Close()
	for _, rec := range now {
		if in(rec) {
			if err := stream.Send(&nodev1.WatchResponse{Sandbox: s.toProto(rec)}); err != nil {
				return err
			}
		}
	}
	if err := stream.Send(&nodev1.WatchResponse{Synced: true}); err != nil {
		return err
	}
	for {
		select {
		case ch, ok := <-sub.C:
			if !ok {
				return status.Error(codes.ResourceExhausted, "this watcher reads too slowly and missed changes; watch again")
			}
			if in(ch.Record) {
				if err := stream.Send(&nodev1.WatchResponse{Sandbox: s.toProto(ch.Record), Deleted: ch.Deleted}); err != nil {
					return err
				}
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// Stop implements nodev1.NodeServer.
func (s *Server) Stop(ctx context.Context, req *nodev1.StopRequest) (*nodev1.StopResponse, error) {
	rec, c, err := s.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	if req.GetGraceMs() > maxGrace.Milliseconds() {
		return nil, status.Errorf(codes.InvalidArgument, "grace of %d ms is too long, at most %s", req.GetGraceMs(), maxGrace)
	}
	grace := time.Duration(max(req.GetGraceMs(), -1)) * time.Millisecond
	if err := s.cfg.Sandboxes.Stop(rec.ID, sandbox.StopRequest{Reason: sandbox.StoppedBy, By: c.String(), Grace: grace}); err != nil {
		return nil, failure(err)
	}
	rec, err = s.cfg.Sandboxes.Wait(ctx, rec.ID)
	if err != nil {
		return nil, failure(err)
	}
	return &nodev1.StopResponse{Sandbox: s.toProto(rec)}, nil
}

// Delete implements nodev1.NodeServer.
func (s *Server) Delete(ctx context.Context, req *nodev1.DeleteRequest) (*nodev1.DeleteResponse, error) {
	rec, c, err := s.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	if req.GetForce() {
		if err := s.cfg.Sandboxes.Stop(rec.ID, sandbox.StopRequest{Reason: sandbox.StoppedBy, By: c.String(), Grace: -1}); err != nil {
			return nil, failure(err)
		}
		if _, err := s.cfg.Sandboxes.Wait(ctx, rec.ID); err != nil {
			return nil, failure(err)
		}
	}
	if err := s.cfg.Sandboxes.Delete(rec.ID); err != nil {
		return nil, failure(err)
	}
	return &nodev1.DeleteResponse{}, nil
}

// Wait implements nodev1.NodeServer.
func (s *Server) Wait(ctx context.Context, req *nodev1.WaitRequest) (*nodev1.WaitResponse, error) {
	rec, _, err := s.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	if rec, err = s.cfg.Sandboxes.Wait(ctx, rec.ID); err != nil {
		return nil, failure(err)
	}
	return &nodev1.WaitResponse{Sandbox: s.toProto(rec)}, nil
}
