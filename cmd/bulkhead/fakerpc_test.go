// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

func (f *fakeNode) Get(_ context.Context, req *nodev1.GetRequest) (*nodev1.GetResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.find(req.GetRef())
	if err != nil {
		return nil, err
	}
	resp := &nodev1.GetResponse{Sandbox: proto.Clone(b.s).(*sandboxv1.Sandbox), Events: slices.Clone(b.events),
		Policy: "1  allow  model-api of acme   203.0.113.0/24  443/tcp\n"}
	if b.s.GetExit() == nil {
		resp.Network = &nodev1.Network{EgressBytes: 5 << 20, EgressPackets: 3600, EgressWireBytes: 5<<20 + 14*3600,
			IngressBytes: 900, IngressPackets: 9, IngressWireBytes: 1026, DroppedBytes: 180, DroppedPackets: 3}
		resp.Rules = []*nodev1.RuleCounter{{Tenant: "acme", Rule: "model-api", Packets: 3600, Bytes: 5 << 20, LastEventNs: epoch.UnixNano()}}
		resp.Drops = []*nodev1.DropCounter{{Reason: "metadata", Packets: 2, Bytes: 120}, {Reason: "no_rule", Packets: 1, Bytes: 60}}
	}
	return resp, nil
}

func (f *fakeNode) List(_ context.Context, req *nodev1.ListRequest) (*nodev1.ListResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &nodev1.ListResponse{}
	for _, b := range f.boxes {
		if (req.GetAll() || b.s.GetExit() == nil) && strings.HasPrefix(b.s.GetSpec().GetTenant()+"/", req.GetTenant()) {
			resp.Sandboxes = append([]*sandboxv1.Sandbox{proto.Clone(b.s).(*sandboxv1.Sandbox)}, resp.Sandboxes...)
		}
	}
	return resp, nil
}

func (f *fakeNode) Watch(_ *nodev1.WatchRequest, stream grpc.ServerStreamingServer[nodev1.WatchResponse]) error {
	sent := map[string]*sandboxv1.Sandbox{}
	synced := false
	for {
		var out []*nodev1.WatchResponse
		err := f.until(stream.Context(), func() bool {
			there := map[string]bool{}
			for _, b := range f.boxes {
				there[b.s.GetId()] = true
				if !proto.Equal(sent[b.s.GetId()], b.s) {
					sent[b.s.GetId()] = proto.Clone(b.s).(*sandboxv1.Sandbox)
					out = append(out, &nodev1.WatchResponse{Sandbox: sent[b.s.GetId()]})
				}
			}
			for id, s := range sent {
				if !there[id] {
					delete(sent, id)
					out = append(out, &nodev1.WatchResponse{Sandbox: s, Deleted: true})
				}
			}
			return !synced || len(out) > 0
		})
		if err != nil {
			return err
		}
		if !synced {
			synced = true
			out = append(out, &nodev1.WatchResponse{Synced: true})
		}
		for _, m := range out {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}

func (f *fakeNode) Stop(ctx context.Context, req *nodev1.StopRequest) (*nodev1.StopResponse, error) {
	f.mu.Lock()
	b, err := f.find(req.GetRef())
	if err == nil {
		f.stops = append(f.stops, req.GetGraceMs())
		b.stop <- req.GetGraceMs()
		f.signal()
	}
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	s, err := f.stopped(ctx, b)
	return &nodev1.StopResponse{Sandbox: s}, err
}

func (f *fakeNode) stopped(ctx context.Context, b *box) (s *sandboxv1.Sandbox, err error) {
	err = f.until(ctx, func() bool {
		s = proto.Clone(b.s).(*sandboxv1.Sandbox)
		return s.GetExit() != nil
	})
	return s, err
}

func (f *fakeNode) Delete(ctx context.Context, req *nodev1.DeleteRequest) (*nodev1.DeleteResponse, error) {
	f.mu.Lock()
	b, err := f.find(req.GetRef())
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if req.GetForce() {
		if _, err := f.Stop(ctx, &nodev1.StopRequest{Ref: b.s.GetId(), GraceMs: -1}); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if b.s.GetExit() == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "sandbox %s is running; stop it first, or delete it with force", b.s.GetId())
	}
	f.remove(b)
	f.signal()
	return &nodev1.DeleteResponse{}, nil
}

func (f *fakeNode) Wait(ctx context.Context, req *nodev1.WaitRequest) (*nodev1.WaitResponse, error) {
	f.mu.Lock()
	f.waits++
	f.signal()
	b, err := f.find(req.GetRef())
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	s, err := f.stopped(ctx, b)
	return &nodev1.WaitResponse{Sandbox: s}, err
}

func (f *fakeNode) Logs(req *nodev1.LogsRequest, stream grpc.ServerStreamingServer[nodev1.LogsResponse]) error {
	f.mu.Lock()
	b, err := f.find(req.GetRef())
	next := 0
	if err == nil {
		switch {
		case req.GetTail() < 0:
			next = len(b.log)
		case req.GetTail() > 0:
			next = max(0, len(b.log)-int(req.GetTail()))
		}
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	for ended := false; !ended; {
		var out []*nodev1.LogsResponse
		err := f.until(stream.Context(), func() bool {
			out = b.log[next:]
			ended = b.s.GetExit() != nil || !req.GetFollow()
			return len(out) > 0 || ended
		})
		if err != nil {
			return err
		}
		next += len(out)
		for _, e := range out {
			if err := stream.Send(e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *fakeNode) Attach(stream grpc.BidiStreamingServer[nodev1.ExecRequest, nodev1.ExecResponse]) error {
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	live := make(chan *nodev1.ExecResponse, 1024)
	f.mu.Lock()
	b, err := f.find(m.GetStart().GetRef())
	if err == nil && b.s.GetExit() != nil && f.late {
		live <- &nodev1.ExecResponse{Message: &nodev1.ExecResponse_ExitCode{ExitCode: b.s.GetExit().GetCode()}}
	} else if err == nil && b.s.GetExit() != nil {
		err = status.Error(codes.FailedPrecondition, "the command is over")
	} else if err == nil && !b.s.GetSpec().GetTerminal() && b.stdin == nil {
		err = status.Error(codes.FailedPrecondition, "started without -i and -t: there is nothing to attach to")
	}
	if err == nil {
		if r := m.GetStart().GetRows(); r > 0 {
			b.size <- &nodev1.Resize{Rows: r, Cols: m.GetStart().GetCols()}
		}
		b.live = append(b.live, live)
		f.signal()
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			switch m := m.GetMessage().(type) {
			case *nodev1.ExecRequest_Stdin:
				b.stdin <- m.Stdin
			case *nodev1.ExecRequest_CloseStdin:
				close(b.stdin)
			case *nodev1.ExecRequest_Resize:
				b.size <- m.Resize
			}
		}
	}()
	return relay(stream, live)
}

// relay sends until the exit code.
func relay(stream grpc.BidiStreamingServer[nodev1.ExecRequest, nodev1.ExecResponse], from <-chan *nodev1.ExecResponse) error {
	for {
		select {
		case m := <-from:
			if err := stream.Send(m); err != nil {
				return err
			}
			if _, last := m.GetMessage().(*nodev1.ExecResponse_ExitCode); last {
				return nil
			}
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

func (f *fakeNode) Exec(stream grpc.BidiStreamingServer[nodev1.ExecRequest, nodev1.ExecResponse]) error {
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	start := m.GetStart()
	f.mu.Lock()
	b, err := f.find(start.GetRef())
	if err == nil && b.s.GetExit() != nil {
		err = status.Errorf(codes.FailedPrecondition, "sandbox %s is not running", b.s.GetId())
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	in, sig, size := make(chan []byte, 64), make(chan int32, 16), make(chan *nodev1.Resize, 16)
	if start.GetRows() > 0 {
		size <- &nodev1.Resize{Rows: start.GetRows(), Cols: start.GetCols()}
	}
	if !start.GetStdin() {
		close(in)
	}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			switch m := m.GetMessage().(type) {
			case *nodev1.ExecRequest_Stdin:
				in <- m.Stdin
			case *nodev1.ExecRequest_CloseStdin:
				close(in)
			case *nodev1.ExecRequest_Resize:
				size <- m.Resize
			case *nodev1.ExecRequest_Signal:
				sig <- m.Signal
			}
		}
	}()
	out := make(chan *nodev1.ExecResponse, 1024)
	out <- &nodev1.ExecResponse{Message: &nodev1.ExecResponse_Started{Started: true}}
	go func() {
		p := &process{in: in, sig: sig, size: size, emit: func(s nodev1.Stream, data string) {
			if s == nodev1.Stream_STREAM_STDERR {
				out <- &nodev1.ExecResponse{Message: &nodev1.ExecResponse_Stderr{Stderr: []byte(data)}}
			} else {
				out <- &nodev1.ExecResponse{Message: &nodev1.ExecResponse_Stdout{Stdout: []byte(data)}}
			}
		}}
		words := start.GetCommand()
		if words[0] == "env" {
			words = []string{"echo", strings.Join(append(start.GetEnv(), start.GetWorkdir()), " ")}
		}
		out <- &nodev1.ExecResponse{Message: &nodev1.ExecResponse_ExitCode{ExitCode: p.run(script(words)).Code}}
	}()
	return relay(stream, out)
}

func (f *fakeNode) NodeInfo(context.Context, *nodev1.NodeInfoRequest) (*nodev1.NodeInfoResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info := proto.Clone(f.info).(*nodev1.NodeInfoResponse)
	for _, b := range f.boxes {
		if b.s.GetExit() == nil {
			info.Sandboxes++
			info.CpuMillisUsed += b.s.GetSpec().GetLimits().GetCpuMillis()
			info.MemoryBytesUsed += b.s.GetSpec().GetLimits().GetMemoryBytes()
		}
	}
	return info, nil
}

func (f *fakeNode) Usage(_ context.Context, req *nodev1.UsageRequest) (*nodev1.UsageResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &nodev1.UsageResponse{}
	for i, b := range f.boxes {
		s := b.s
		if req.GetRef() != "" && req.GetRef() != s.GetId() && req.GetRef() != s.GetSpec().GetName() ||
			!strings.HasPrefix(s.GetSpec().GetTenant()+"/", req.GetTenant()) {
			continue
		}
		end := epoch.UnixNano() + 7200e9
		for meter, total := range map[string]uint64{"cpu_ns": 3_600_000_000_001 * uint64(i+1), "mem_mib_ms": 1024 * 3_600_000,
			"egress_bytes": 5_000_000_000, "wall_ms": 7_200_000} {
			resp.Rows = append(resp.Rows, &nodev1.UsageRow{Tenant: s.GetSpec().GetTenant(), Sandbox: s.GetId(), SandboxName: s.GetSpec().GetName(),
				Meter: meter, Total: total, StartNs: s.GetStartedNs(), EndNs: end})
		}
	}
	return resp, nil
}

func (f *fakeNode) ListTenants(context.Context, *nodev1.ListTenantsRequest) (*nodev1.ListTenantsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	used := &nodev1.Quota{}
	for _, b := range f.boxes {
		if b.s.GetExit() == nil {
			l := b.s.GetSpec().GetLimits()
			used.CpuMillis, used.MemoryBytes, used.Pids, used.Sandboxes = used.CpuMillis+l.GetCpuMillis(), used.MemoryBytes+l.GetMemoryBytes(),
				used.Pids+l.GetPids(), used.Sandboxes+1
		}
	}
	return &nodev1.ListTenantsResponse{Tenants: []*nodev1.Tenant{
		{Path: "acme/vision", Limit: &nodev1.Quota{}, InUse: used, File: "/etc/bulkhead/tenants/acme-vision.yaml"},
		{Path: "acme", Limit: &nodev1.Quota{CpuMillis: 4000, MemoryBytes: 1 << 30, Pids: 2000, Sandboxes: 50}, InUse: used,
			Rules: []string{"model-api", "no-crawling"}, File: "/etc/bulkhead/tenants/acme.yaml"},
	}}, nil
}

func (f *fakeNode) Reload(context.Context, *nodev1.ReloadRequest) (*nodev1.ReloadResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.info.GetVersion() == "broken" {
		return nil, status.Error(codes.InvalidArgument, "/etc/bulkhead/tenants/acme.yaml:7: unknown key \"prots\" (did you mean ports?)")
	}
	return &nodev1.ReloadResponse{Tenants: 2, SandboxesUpdated: uint32(len(f.boxes))}, nil
}

func (f *fakeNode) ImportImage(stream grpc.ClientStreamingServer[nodev1.ImportImageRequest, nodev1.ImportImageResponse]) error {
	var data bytes.Buffer
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		data.Write(m.GetChunk())
		if !bytes.HasPrefix(data.Bytes(), []byte("OCI")) {
			return status.Error(codes.InvalidArgument, "not an OCI or docker archive")
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	image := &nodev1.Image{Reference: "example.com/web:2", Digest: "sha256:77aa", SizeBytes: int64(data.Len()), CreatedNs: epoch.UnixNano()}
	f.images = append(f.images, image)
	return stream.SendAndClose(&nodev1.ImportImageResponse{Images: []*nodev1.Image{image}})
}

func (f *fakeNode) PullImage(_ context.Context, req *nodev1.PullImageRequest) (*nodev1.PullImageResponse, error) {
	if !req.GetPlainHttp() {
		return nil, status.Errorf(codes.Unavailable, "pull %s: the registry does not speak TLS", req.GetReference())
	}
	return &nodev1.PullImageResponse{Image: &nodev1.Image{Reference: req.GetReference(), Digest: "sha256:99bb", SizeBytes: 12345678, CreatedNs: epoch.UnixNano()}}, nil
}

func (f *fakeNode) ListImages(context.Context, *nodev1.ListImagesRequest) (*nodev1.ListImagesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &nodev1.ListImagesResponse{Images: slices.Clone(f.images)}, nil
}
