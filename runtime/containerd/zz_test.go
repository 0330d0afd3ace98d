package containerd
import ("testing";"time";"fmt";"os";"slices"
"github.com/bulkheadhq/bulkhead/runtime"
"github.com/bulkheadhq/bulkhead/runtime/runtimetest")
func TestZZ(t *testing.T){
 r:=start(t)
 ctx:=t.Context()
 type v struct{name string; mod func(*runtime.Spec)}
 vs:=[]v{{"nolimits",func(s*runtime.Spec){}},{"cpu",func(s*runtime.Spec){s.CPUMillis=1000}},{"mem",func(s*runtime.Spec){s.MemoryBytes=64<<20}},{"pids",func(s*runtime.Spec){s.PIDs=64}},{"all",func(s*runtime.Spec){s.CPUMillis=1000;s.MemoryBytes=64<<20;s.PIDs=64}}}
 res:=map[string][][2]time.Duration{}
 for i:=0;i<15;i++{ for j,x:=range vs{
  id:=fmt.Sprintf("z%d-%d-%d",os.Getpid(),i,j)
  s:=runtime.Spec{ID:id,Image:runtimetest.BusyboxRef,Command:[]string{"sleep","1000"},CgroupPath:node.daemon.CgroupParent+"/"+id,LogDir:node.daemon.Dir+"/logs/"+id}
  x.mod(&s)
  b:=time.Now()
  tk,err:=r.Create(ctx,s); if err!=nil{t.Fatal(err)}
  c:=time.Since(b); b=time.Now()
  if err:=tk.Start(ctx);err!=nil{t.Fatal(err)}
  st:=time.Since(b)
  res[x.name]=append(res[x.name],[2]time.Duration{c,st})
  r.Remove(ctx,id)
 }}
 for _,x:=range vs{ var c,s []time.Duration; for _,p:=range res[x.name]{c=append(c,p[0]);s=append(s,p[1])}; slices.Sort(c);slices.Sort(s); fmt.Println(x.name,"create",c[len(c)/2],"start",s[len(s)/2], "min", c[0], s[0])}
}
